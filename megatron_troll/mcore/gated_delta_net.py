"""The Gated DeltaNet layer of Qwen3-Next: linear attention whose state is a matrix per head.

Megatron's own layer needs flash-linear-attention, and so a GPU, and does not support generation; this one
runs anywhere. Heads are divided over the tensor-parallel ranks. The causal convolution and the delta rule
process packed sequences end to end if a kernel accepts their starts, otherwise as rows of dense batches.
Under context parallelism, each rank runs both on every position of its share of the heads.
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
from megatron_troll.mcore.kv_cache import Extension
from megatron_troll.mcore.packing import Continued, Flat, PackedSequences
from megatron_troll.mcore.parallel import device
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class GatedDeltaNetSubmodules:
    """Modules inside the layer.

    in_proj     column-parallel, [query, key, value, z, b, a], each divided over the ranks by heads
    out_norm    over one head, not zero-centred
    out_proj    row-parallel
    """

    in_proj: ModuleSpec | type
    out_norm: ModuleSpec | type
    out_proj: ModuleSpec | type


@dataclass(frozen=True)
class Memory:
    """State that generation keeps of the positions so far.

    inputs  [B, conv - 1, channels] the newest inputs of the convolution
    state   [B, Hv, Dk, Dv] fp32
    """

    inputs: Tensor
    state: Tensor


@dataclass(frozen=True)
class Widths:
    """Number of channels of each kind."""

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
    """Widths on one of the `ranks` over which the heads are divided."""
    sizes: Any = config  # Megatron's type allows None
    heads = sizes.linear_num_value_heads // ranks
    key = sizes.linear_num_key_heads // ranks * sizes.linear_key_head_dim
    value = heads * sizes.linear_value_head_dim
    return Widths(query=key, key=key, value=value, z=value, b=heads, a=heads)


class GatedDeltaNet(MegatronModule):
    """Replaces self-attention in a Megatron layer: [s, b, h] to [s, b, h] (and no bias)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        kernels_for(device(), config.params_dtype)  # raises if they are too old
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
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        projected, _bias = self.in_proj(hidden_states)
        *convolved, z, b, a = projected.split(self.widths.projected, -1)
        rows = self.exchange.to_heads([*convolved, b, a])
        if packed_seq_params is not None:
            mixed = self._packed(rows, packed_seq_params)
        else:
            mixed = self._padded(rows)
        gated = self._gated(self.exchange.to_positions(mixed), z)
        output, _bias = self.out_proj(gated)
        return output, None

    def _padded(self, rows: Tensor) -> Tensor:
        """Mix rows [cp x s, b, w] of sequences padded on the right: no earlier position sees the padding."""
        order = self.exchange.order(rows.shape[0], rows.device)
        return self._whole(rows[order.argsort()].transpose(0, 1)).transpose(0, 1)[order]

    def _packed(self, rows: Tensor, packed: PackedSequences) -> Tensor:
        """Mix packed rows [cp x t, 1, w]. Positions that belong to no sequence give zeros."""
        mixed, flat = rows.new_zeros(rows.shape[0], self.mine.value), packed.flat
        if packed.generation is not None:
            return self._generated(rows[:, 0], packed, packed.generation, mixed)[:, None]
        if packed.continued:
            return self._continued(rows[:, 0], packed.continued, mixed)[:, None]
        if flat is not None and kernels_for(rows.device, rows.dtype):
            sequences = self._again(self._mix_flat, rows[flat.key, 0], flat)
            return mixed.index_copy(0, flat.key, sequences)[:, None]
        for bucket in packed.buckets:
            sequences = self._whole(rows[bucket.key, 0])
            mixed = mixed.index_put((bucket.key[bucket.real],), sequences[bucket.real])
        return mixed[:, None]

    def _continued(self, rows: Tensor, batches: Sequence[Continued], mixed: Tensor) -> Tensor:
        """Mix rows [cp x t, w] of sequences that continue one another, into zeros `mixed`: each starts from
        the memory that the one before it has left."""
        inputs = rows.new_zeros(1, self.conv1d.kernel_size[0] - 1, sum(self.mine.convolved))
        heads, key, value = self.mine.b, self.key_head[1], self.value_head[1]
        memories = Memory(inputs, wide(rows).new_zeros(1, heads, key, value))
        for batch in batches:
            before = Memory(memories.inputs[batch.before], memories.state[batch.before])
            sequences, after = self._again(self._mix, rows[batch.key], before, batch.length)
            real = torch.arange(batch.key.shape[1], device=rows.device) < batch.length[:, None]
            mixed = mixed.index_put((batch.key[real],), sequences[real])
            pairs = (memories.inputs, after.inputs), (memories.state, after.state)
            memories = Memory(*(torch.cat([held, new[batch.kept]]) for held, new in pairs))
        return mixed

    def _generated(
        self, rows: Tensor, packed: PackedSequences, generation: Extension, mixed: Tensor
    ) -> Tensor:
        """Mix rows [t, w] of prompts and of one more token of each row of a cache, into zeros `mixed`. The
        prompts leave their memories, the cache has those of its rows."""
        for batch in packed.continued:
            sequences, after = self._mix(rows[batch.key], None, batch.length)
            real = torch.arange(batch.key.shape[1], device=rows.device) < batch.length[:, None]
            mixed[batch.key[real]] = sequences[real]
            for row, i in enumerate(batch.members):
                generation.prompts[i].fixed[self.layer_number] = after.inputs[row], after.state[row]
        count = len(generation.lengths)
        if count:
            held = generation.cache.fixed[self.layer_number]
            new = rows[generation.prompt_tokens :, None]
            extended, after = self._mix(new, Memory(*(tensor[:count] for tensor in held)))
            mixed[generation.prompt_tokens :] = extended[:, 0]
            for tensor, now in zip(held, (after.inputs, after.state)):
                tensor[:count] = now
        return mixed

    def _whole(self, rows: Tensor) -> Tensor:
        """Mix whole sequences [B, L, w]."""
        return self._again(self._mix, rows, None)[0]

    def _again[**P, T](self, mix: Callable[P, T], *inputs: P.args, **named: P.kwargs) -> T:
        """Call `mix` on the inputs. Selective recomputation recomputes everything in it, as in core
        attention."""
        if not (self.recomputed and self.training):
            return mix(*inputs, **named)
        mixed: Any = checkpoint(mix, *inputs, **named, use_reentrant=False, preserve_rng_state=False)
        return mixed

    def _mix(
        self, rows: Tensor, memory: Memory | None, length: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Apply convolution and delta rule to whole sequences [B, L, w], or to the positions after `memory`.
        Returns [B, L, heads x Dv] for this rank's heads, and the new memory: that after the last position or
        after the first `length` [B]."""
        inputs, b, a = self._split(rows)
        weight = self._convolution()
        before = inputs.new_zeros(len(rows), weight.shape[-1] - 1, inputs.shape[-1])
        seen = torch.cat([before if memory is None else memory.inputs, inputs], 1)
        convolved = F.silu(F.conv1d(seen.mT, weight, groups=inputs.shape[-1])).mT
        query, key, value, decay, beta = self._rule_inputs(convolved, b, a)
        newest = seen[:, rows.shape[1] :]
        if length is not None:
            # What neither decays a state nor writes to it leaves it as it is.
            padding = (torch.arange(rows.shape[1], device=rows.device) >= length[:, None])[..., None]
            decay, beta = decay.masked_fill(padding, 0.0), beta.masked_fill(padding, 0.0)
            at = length[:, None] + torch.arange(before.shape[1], device=rows.device)
            newest = seen[torch.arange(len(rows), device=rows.device)[:, None], at]
        state = None if memory is None else memory.state
        mixed, state = delta_rule(query, key, value, decay, beta, state)
        return mixed.flatten(2), Memory(newest, state)

    def _mix_flat(self, rows: Tensor, flat: Flat) -> Tensor:
        """Apply convolution and fused delta rule to whole sequences end to end: [T, w] to [T, heads x Dv]."""
        inputs, b, a = self._split(rows)
        weight = self._convolution()
        gap = weight.shape[-1] - 1
        # Insert as many zeros before each sequence as the convolution looks back: it sees no other sequence.
        at = torch.arange(len(rows), device=rows.device) + gap * flat.sequence
        spaced = inputs.new_zeros(len(rows) + gap * (len(flat.starts_cpu) - 1), inputs.shape[-1])
        spaced = spaced.index_copy(0, at + gap, inputs)
        convolved = F.silu(F.conv1d(spaced.mT[None], weight, groups=inputs.shape[-1])).mT[:, at]
        kernels = kernels_for(rows.device, rows.dtype)
        assert kernels is not None
        return kernels.flat(*self._rule_inputs(convolved, b[None], a[None]), flat)[0].flatten(1)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows into the inputs of the convolution, b and a."""
        return rows.split([sum(self.mine.convolved), self.mine.b, self.mine.a], -1)

    def _rule_inputs(
        self, convolved: Tensor, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Inputs [B, L, ...] of the delta rule: query, key, value, decay and beta."""
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
        """Convolution weight [channels, 1, conv] of this rank's heads."""
        kinds = self.conv1d.weight.split(self.widths.convolved)
        return torch.cat([self.exchange.share(kind.movedim(0, -1)) for kind in kinds], -1).movedim(-1, 0)

    def _gated(self, mixed: Tensor, z: Tensor) -> Tensor:
        """norm(mixed) * silu(z) for each head."""
        normed = self.out_norm(mixed.unflatten(-1, self.value_head))
        return (normed * F.silu(wide(z.unflatten(-1, self.value_head)))).to(mixed.dtype).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State dict with a separate tensor for each kind of rows, so that any layout can read it."""
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
    """Factory that stores `parameter` as tensors `key`.<kind>. `kinds` gives this rank's number of rows of
    each kind, stacked in `parameter` in this order. Also works for optimizer state of the same shape."""

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
    """Exchange between "my positions of every head" and "every position of my heads" over context-parallel
    ranks. Each rank has an equal share of each kind of heads. Without context parallelism nothing moves."""

    cp: Group

    def to_heads(self, kinds: Sequence[Tensor]) -> Tensor:
        """Tensors [s, b, w_i], heads along w_i -> [cp x s, b, sum(w_i) / cp], positions grouped by
        rank. Blocks."""
        shares = [torch.cat([self.share(kind, rank) for kind in kinds], -1) for rank in range(self.cp.size)]
        return shares[0] if self.cp.size == 1 else self._swap(torch.cat(shares))

    def to_positions(self, mixed: Tensor) -> Tensor:
        """[cp x s, b, w / cp] -> [s, b, w]. Blocks."""
        return mixed if self.cp.size == 1 else torch.cat(self._swap(mixed).chunk(self.cp.size), -1)

    def share(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """The heads of one rank (default: this one), cut from the last axis of `tensor`."""
        return tensor.chunk(self.cp.size, -1)[self.cp.rank if rank is None else rank]

    def order(self, positions: int, device: torch.device) -> Tensor:
        """[cp x s] position, in the whole unpacked sequence, of each row that `to_heads` returns."""
        ranks = range(self.cp.size)
        return torch.cat([zigzag(positions, self.cp.size, rank) for rank in ranks]).to(device)

    def _swap(self, tensor: Tensor) -> Tensor:
        swapped: Any = all_to_all(self.cp.handle, tensor)
        return swapped
