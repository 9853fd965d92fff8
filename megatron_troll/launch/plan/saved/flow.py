"""One micro-batch on one rank: how many rows of what its layers see."""

from dataclasses import dataclass

from megatron_troll.config.tree import Model
from megatron_troll.launch.plan.states import WIDTHS
from megatron_troll.mcore.shape import ModelShape

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class SavedBytes:
    """Bytes. kept: from forward to backward of the micro-batch; again: what is then computed again, of one
    layer at a time; experts: of `kept`, what depends on where tokens are routed."""

    kept: int
    again: int
    experts: int

    def __add__(self, other: "SavedBytes") -> "SavedBytes":
        return SavedBytes(self.kept + other.kept, max(self.again, other.again), self.experts + other.experts)


@dataclass(frozen=True)
class Flow:
    """`tokens`: of the micro-batch on this context-parallel rank. `te`: Transformer Engine's layers; else the
    local ones. Experts are taken to be even: each gets the same number of tokens."""

    shape: ModelShape
    model: Model
    tokens: int
    te: bool

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTHS[self.model.dtype]

    @property
    def shard(self) -> int:
        """Tokens where sequence parallelism cuts them."""
        return self.tokens // self.model.layout.tp

    @property
    def routed(self) -> int:
        """Tokens, one for each expert chosen, that this rank sends."""
        return self.shard * self.shape.experts_per_token

    @property
    def received(self) -> int:
        """Tokens that the experts of this rank get, the same ones on each expert-tensor-parallel rank."""
        return self.routed * self.model.layout.etp

    def hidden(self, rows: int) -> int:
        """Bytes of hidden states."""
        return self.width * rows * self.shape.hidden

    def norm(self, rows: int, size: int) -> int:
        """Bytes that an RMSNorm keeps: Transformer Engine's its input, the local one what it computed in
        fp32 too."""
        if self.te:
            return self.width * rows * size + FLOAT * rows
        normed = FLOAT if self.shape.zero_centred_norms else self.width
        return FLOAT * rows * size + FLOAT * rows + normed * rows * size
