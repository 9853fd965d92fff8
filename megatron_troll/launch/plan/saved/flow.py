"""One micro-batch on one rank: the numbers of rows that its layers process."""

from dataclasses import dataclass

from megatron_troll.config import Model
from megatron_troll.launch.plan.states import WIDTHS
from megatron_troll.mcore.shape import ModelShape

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of activations. kept: from forward to backward of the micro-batch; again: recomputed in backward,
    one layer at a time; experts: the part of `kept` that depends on routing."""

    kept: int
    again: int
    experts: int

    def __add__(self, other: "SavedBytes") -> "SavedBytes":
        return SavedBytes(self.kept + other.kept, max(self.again, other.again), self.experts + other.experts)


@dataclass(frozen=True)
class Flow:
    """A micro-batch with `tokens` tokens on this context-parallel rank. `te`: Transformer Engine's layers,
    otherwise the local ones. Routing is assumed to be even: each expert gets the same number of tokens."""

    shape: ModelShape
    model: Model
    tokens: int
    te: bool

    @property
    def width(self) -> int:
        """Bytes of one element."""
        return WIDTHS[self.model.dtype]

    @property
    def shard(self) -> int:
        """Tokens of one tensor-parallel rank where sequence parallelism shards them."""
        return self.tokens // self.model.layout.tp

    @property
    def routed(self) -> int:
        """Tokens that this rank sends, each counted once per chosen expert."""
        return self.shard * self.shape.experts_per_token

    @property
    def received(self) -> int:
        """Tokens that this rank's experts receive, the same ones on each expert-tensor-parallel rank."""
        return self.routed * self.model.layout.etp

    def hidden(self, rows: int) -> int:
        """Bytes of `rows` hidden states."""
        return self.width * rows * self.shape.hidden

    def norm(self, rows: int, size: int) -> int:
        """Bytes that an RMSNorm keeps: Transformer Engine's keeps its input, the local one also what it
        computed in fp32."""
        if self.te:
            return self.width * rows * size + FLOAT * rows
        normed = FLOAT if self.shape.zero_centred_norms else self.width
        return FLOAT * rows * size + FLOAT * rows + normed * rows * size
