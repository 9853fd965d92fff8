"""The Gated DeltaNet layer of Qwen3-Next: linear attention whose state is a matrix per head.

Megatron's own layer needs flash-linear-attention, so a GPU, and takes no generation; this one runs anywhere.
Heads are cut over the tensor-parallel ranks. Packed sequences go through the causal convolution and the delta
rule end to end where a kernel takes their starts, as the rows of dense batches elsewhere. Under context
parallelism each rank has, there, every position of its share of the heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_troll.batching.plan import zigzag
from megatron_troll.mcore.delta_rule import delta_rule, kernels_for, unit, wide
from megatron_troll.mcore.packing import Flat, PackedSequences
from megatron_troll.mcore.parallel import device
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class GatedDeltaNetSubmodules:
    """in_proj  column-parallel, [query, key, value, z, b, a], each cut over the ranks by heads
    out_norm    over one head, not zero-centred
    out_proj    row-parallel
    """

    in_proj: ModuleSpec | type
    out_norm: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass(frozen=True)
class Memory:
    """What generation keeps of the positions so far.

    inputs  [B, conv - 1, channels] the newest inputs of the convolution
    state   [B, Hv, Dk, Dv] fp32
    """

    inputs: Tensor
    state: Tensor


@dataclass(frozen=True)
class Widths:
    """Channels of each kind."""

    query: int
    key: int
    value: int
    z: int
    b: int
    a: int

    @property
    def convolved(self) -> tuple[int, int, int]:
        return self.query, self.key, self.value

    @property
    def projected(self) -> tuple[int, ...]:
        return (*self.convolved, self.z, self.b, self.a)


def widths_of(config: TransformerConfig, ranks: int) -> Widths:
    """On one of the `ranks` that the heads are cut over."""
    sizes: Any = config  # Megatron's type allows None
    heads = sizes.linear_num_value_heads // ranks
    key = sizes.linear_num_key_heads // ranks * sizes.linear_key_head_dim
    value = heads * sizes.linear_value_head_dim
    return Widths(query=key, key=key, value=value, z=value, b=heads, a=heads)


class GatedDeltaNet(MegatronModule):
    """Takes the place of self-attention in a Megatron layer: [s, b, h] to [s, b, h] (and no bias)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        kernels_for(device(), config.params_dtype)  # refuses one that is too old
        self.layer_number = layer_number
        self.recomputed = config.recompute_granularity == "selective"
        sizes: Any = config  # Megatron's type allows None
        self.key_head = (-1, sizes.linear_key_head_dim)
        self.value_head = (-1, sizes.linear_value_head_dim)
        tp, cp = pg_collection.tp, pg_collection.cp
        self.tp = Group(tp, tp.rank(), tp.size())
        self.exchange = HeadExchange(Group(cp, cp.rank(), cp.size()))
        self.widths = widths_of(config, tp.size())
        self.mine = widths_of(config, tp.size() * cp.size())
        everything = widths_of(config, 1)
        linear = {"config": config, "bias": False, "is_expert": False, "tp_group": tp}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            sum(everything.projected),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **linear,
        )
        self._add_own_parameters(config)
        self.out_norm = build_module(
            submodules.out_norm,
            config=config,
            hidden_size=sizes.linear_value_head_dim,
            eps=config.layernorm_epsilon,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            everything.value,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **linear,
        )

    def _add_own_parameters(self, config: TransformerConfig) -> None:
        channels, heads, width = sum(self.widths.convolved), self.widths.b, config.linear_conv_kernel_dim
        assert width is not None
        self.conv1d = nn.Conv1d(
            channels, channels, width, groups=channels, bias=False, dtype=config.params_dtype
        )
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: Any = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """`attention_mask` and `inference_context` are those of generation (decode.py)."""
        projected, _bias = self.in_proj(hidden_states)
        *convolved, z, b, a = projected.split(self.widths.projected, -1)
        rows = self.exchange.to_heads([*convolved, b, a])
        if inference_context is not None:
            assert attention_mask is not None
            mixed = self._extend(rows, attention_mask, inference_context.key_value_memory_dict)
        elif packed_seq_params is not None:
            mixed = self._packed(rows, packed_seq_params)
        else:
            mixed = self._padded(rows)
        gated = self._gated(self.exchange.to_positions(mixed), z)
        output, _bias = self.out_proj(gated)
        return output, None

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows [cp x s, b, w] of sequences padded on the right, which no earlier position sees."""
        order = self.exchange.order(rows.shape[0], rows.device)
        return self._whole(rows[order.argsort()].transpose(0, 1)).transpose(0, 1)[order]

    def _packed(self, rows: Tensor, packed: PackedSequences) -> Tensor:
        """Rows [cp x t, 1, w]. Positions of no sequence come out as zeros."""
        mixed, flat = rows.new_zeros(rows.shape[0], self.mine.value), packed.flat
        if flat is not None and kernels_for(rows.device, rows.dtype):
            sequences = self._again(self._mix_flat, rows[flat.key, 0], flat)
            return mixed.index_copy(0, flat.key, sequences)[:, None]
        for bucket in packed.buckets:
            sequences = self._whole(rows[bucket.key, 0])
            mixed = mixed.index_put((bucket.key[bucket.real],), sequences[bucket.real])
        return mixed[:, None]

    def _extend(self, rows: Tensor, hidden: Tensor, memories: dict[int, Memory]) -> Tensor:
        """Positions [s, b, w] after those of `memories`. `hidden` [b, 1, s, end] hides from the last position
        nothing but padding, which is on the left and leaves no trace."""
        padding = hidden[:, 0, -1, -rows.shape[0] :]
        mixed, memories[self.layer_number] = self._mix(
            rows.transpose(0, 1).masked_fill(padding[..., None], 0), memories.get(self.layer_number)
        )
        return mixed.transpose(0, 1)

    def _whole(self, rows: Tensor) -> Tensor:
        """Whole sequences [B, L, w]."""
        return self._again(self._mix, rows, None)[0]

    def _again[**P, T](self, mix: Callable[P, T], *inputs: P.args, **named: P.kwargs) -> T:
        """`mix` of the inputs. Selective recomputation forms everything in it again, as it does in core
        attention."""
        if not (self.recomputed and self.training):
            return mix(*inputs, **named)
        mixed: Any = checkpoint(mix, *inputs, **named, use_reentrant=False, preserve_rng_state=False)
        return mixed

    def _mix(self, rows: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Whole sequences [B, L, w], or what follows `memory`, through convolution and delta rule to
        [B, L, heads x Dv], over this rank's heads."""
        inputs, b, a = self._split(rows)
        weight = self._convolution()
        before = inputs.new_zeros(len(rows), weight.shape[-1] - 1, inputs.shape[-1])
        seen = torch.cat([before if memory is None else memory.inputs, inputs], 1)
        convolved = F.silu(F.conv1d(seen.mT, weight, groups=inputs.shape[-1])).mT
        mixed, state = delta_rule(
            *self._rule_inputs(convolved, b, a), None if memory is None else memory.state
        )
        return mixed.flatten(2), Memory(seen[:, rows.shape[1] :], state)

    def _mix_flat(self, rows: Tensor, flat: Flat) -> Tensor:
        """Whole sequences end to end [T, w] through both, in kernels, to [T, heads x Dv]."""
        inputs, b, a = self._split(rows)
        weight = self._convolution()
        gap = weight.shape[-1] - 1
        # As many zeros before each sequence as the convolution looks back, so that it sees no other sequence.
        at = torch.arange(len(rows), device=rows.device) + gap * flat.sequence
        spaced = inputs.new_zeros(len(rows) + gap * (len(flat.starts_cpu) - 1), inputs.shape[-1])
        spaced = spaced.index_copy(0, at + gap, inputs)
        convolved = F.silu(F.conv1d(spaced.mT[None], weight, groups=inputs.shape[-1])).mT[:, at]
        kernels = kernels_for(rows.device, rows.dtype)
        assert kernels is not None
        return kernels.flat(*self._rule_inputs(convolved, b[None], a[None]), flat)[0].flatten(1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The inputs of the convolution, b and a."""
        return rows.split([sum(self.mine.convolved), self.mine.b, self.mine.a], -1)

    def _rule_inputs(
        self, convolved: Tensor, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """query, key, value, decay and beta [B, L, ...] of the delta rule."""
        query, key, value = convolved.split(self.mine.convolved, -1)
        rate, bias = self.exchange.share(self.A_log), self.exchange.share(self.dt_bias)
        return (
            unit(query.unflatten(-1, self.key_head)),
            unit(key.unflatten(-1, self.key_head)),
            value.unflatten(-1, self.value_head),
            -wide(rate).exp() * F.softplus(wide(a) + wide(bias)),
            wide(b).sigmoid(),
        )

    def _convolution(self) -> Tensor:
        """[channels, 1, conv] of this rank's heads."""
        kinds = self.conv1d.weight.split(self.widths.convolved)
        return torch.cat([self.exchange.share(kind.movedim(0, -1)) for kind in kinds], -1).movedim(-1, 0)

    def _gated(self, mixed: Tensor, z: Tensor) -> Tensor:
        """norm(mixed) * silu(z) for each head."""
        normed = self.out_norm(mixed.unflatten(-1, self.value_head))
        return (normed * F.silu(wide(z.unflatten(-1, self.value_head)))).to(mixed.dtype).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each kind of rows is a tensor of its own in a checkpoint, so that any layout can read it."""
        assert not sharded_offsets, "layers of several types are not stacked"
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        replica = state[f"{prefix}in_proj.weight"].replica_id
        projected = ("query", "key", "value", "z", "b", "a")
        for name, kinds, rows in (
            ("in_proj.weight", projected, self.widths.projected),
            ("conv1d.weight", projected[:3], self.widths.convolved),
            ("dt_bias", ("heads",), (self.widths.b,)),
            ("A_log", ("heads",), (self.widths.a,)),
        ):
            key = f"{prefix}{name}"
            data = self.get_parameter(name)
            state[key] = cut_rows(key, data, dict(zip(kinds, rows, strict=True)), self.tp, replica)
        return state


def cut_rows(
    key: str, parameter: Tensor, kinds: dict[str, int], tp: Group, replica: ReplicaId
) -> ShardedTensorFactory:
    """`parameter` as the tensors `key`.<kind>, of which it holds, one below the other, this rank's `kinds`
    rows each. For an optimizer's state of the same shape too."""

    def build(key: str, tensor: Tensor, replica: ReplicaId, flattened_range: slice | None) -> Any:
        assert flattened_range is None
        pieces = tensor.split(list(kinds.values()))
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{kind}", piece, (0, tp.rank, tp.size), replica_id=replica)
            for kind, piece in zip(kinds, pieces, strict=True)
        ]

    def merge(pieces: Any) -> Tensor:
        return torch.cat(pieces)

    return ShardedTensorFactory(key, parameter, build, merge, replica)


@dataclass(frozen=True)
class HeadExchange:
    """Between "my positions of every head" and "every position of my heads", a rank's heads being its equal
    share of each kind. Without context parallelism nothing moves."""

    cp: Group

    def to_heads(self, kinds: Sequence[Tensor]) -> Tensor:
        """Tensors [s, b, w_i], heads along w_i -> [cp x s, b, sum(w_i) / cp], the positions of each rank
        together. Blocks."""
        shares = [torch.cat([self.share(kind, rank) for kind in kinds], -1) for rank in range(self.cp.size)]
        return shares[0] if self.cp.size == 1 else self._swap(torch.cat(shares))

    def to_positions(self, mixed: Tensor) -> Tensor:
        """[cp x s, b, w / cp] -> [s, b, w]. Blocks."""
        return mixed if self.cp.size == 1 else torch.cat(self._swap(mixed).chunk(self.cp.size), -1)

    def share(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """The heads, along the last axis, of one rank (default: this one)."""
        return tensor.chunk(self.cp.size, -1)[self.cp.rank if rank is None else rank]

    def order(self, positions: int, device: torch.device) -> Tensor:
        """[cp x s] which position of a whole, unpacked sequence each row of `to_heads` is."""
        ranks = range(self.cp.size)
        return torch.cat([zigzag(positions, self.cp.size, rank) for rank in ranks]).to(device)

    def _swap(self, tensor: Tensor) -> Tensor:
        swapped: Any = all_to_all(self.cp.handle, tensor)
        return swapped
