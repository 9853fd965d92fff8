"""The sizes of one model, whatever its family."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_troll.mcore.shape.rope import RopeScaling

LayerType = Literal["full_attention", "linear_attention"]


@dataclass(frozen=True)
class LinearAttention:
    """Sizes of the Gated DeltaNet layers (arXiv:2412.06464): each key head serves value_heads / key_heads
    neighbouring value heads; `conv` is the width of the causal convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. experts is 0 for a dense model, shared_expert_ffn is 0 without a shared expert;
    `vocab` is the published size, unpadded; with a soft-cap, logits are softcap * tanh(x / softcap).

    layer_types       type of each layer, in order
    linear            sizes of the layers with linear attention; None without such layers
    output_gate       whether full attention is gated by its input (arXiv:2505.06708)
    rotary_fraction   fraction of head_dim that is rotated
    zero_centred_norms   whether norms scale by 1 + weight
    rope_scaling      how rotary frequencies differ from powers of rope_theta; None: they do not
    qk_norm           whether queries and keys are normed per head
    qkv_bias          whether the projections to queries, keys and values have biases
    rotary_layers     whether each layer rotates queries and keys; () if all do
    activation        of the MLP: silu with a gate (arXiv:2002.05202), or xIELU without (arXiv:2411.13010)
    """

    family: str
    vocab: int
    hidden: int
    layer_types: tuple[LayerType, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int
    experts_per_token: int
    expert_ffn: int
    norm_topk: bool
    tied: bool
    rope_theta: float
    norm_eps: float
    init_std: float
    max_positions: int
    softcap: float | None = None
    shared_expert_ffn: int = 0
    linear: LinearAttention | None = None
    output_gate: bool = False
    rotary_fraction: float = 1.0
    zero_centred_norms: bool = False
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = True
    qkv_bias: bool = False
    rotary_layers: tuple[bool, ...] = ()
    activation: Literal["silu", "xielu"] = "silu"

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its activations by a second projection."""
        return self.activation == "silu"

    def rotates(self, layer: int) -> bool:
        return not self.rotary_layers or self.rotary_layers[layer]

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows over all tensor-parallel ranks, padded to equal shards."""
        return -(-self.vocab // tp) * tp


def described(shape: ModelShape) -> dict[str, Any]:
    """`shape` as a dict of JSON values. Leaves out fields at their default, so that a new field of ModelShape
    keeps older checkpoints readable."""
    described = {
        field.name: getattr(shape, field.name)
        for field in fields(shape)
        if getattr(shape, field.name) != field.default
    }
    if shape.linear is None:
        described |= {"layers": len(described.pop("layer_types"))}
    return json.loads(json.dumps(described, default=asdict))
