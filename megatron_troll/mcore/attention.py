"""Core attention on torch's scaled_dot_product_attention, for the local layer spec.

Megatron's own local attention supports neither packed sequences nor context parallelism. This one supports
both, and the KV cache of in-process generation.

Under context parallelism a rank computes, for each chunk of queries it holds, causal attention to the keys up
to the chunk's end. This needs no mask, and neither forward nor backward holds positions x positions.
"""

from functools import reduce
from typing import Any, override

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_troll.batching.plan import zigzag
from megatron_troll.mcore.kv_cache import Extension
from megatron_troll.mcore.packing import PackedSequences
from megatron_troll.mcore.tree_attention import attend, attend_masked
from megatron_troll.parallel.groups import Group


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention. `attention_factor`: scale of the sines and cosines of the rotary
    embedding."""

    def __init__(self, *args: Any, attention_factor: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._yarn_concentration_factor = attention_factor

    @override
    def forward(
        self, *inputs: Any, rotary_pos_emb: Any = None, packed_seq_params: Any = None, **options: Any
    ) -> Any:
        """Rotary angles `rotary_pos_emb`: [longest, 1, 1, d]."""
        if packed_seq_params is not None and rotary_pos_emb is not None:
            # Given the angles of the longest sequence, Megatron 0.19 rotates sequences one by one and copies
            # each into the whole tensor: the backward of every copy processes the whole tensor. Given the
            # angles of every token, it rotates all at once.
            rotary_pos_emb = rotary_pos_emb[packed_seq_params.position]
        return super().forward(
            *inputs, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **options
        )

    @override
    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """Same as Megatron's, but not compiled, which would take minutes on a machine without CUDA."""
        return (x * torch.sigmoid(gate.reshape(x.shape).float())).to(x.dtype)


class CoreAttention(MegatronModule):
    """Causal grouped-query attention without dropout, fp32 or bf16.

    Under context parallelism keys and values of the whole micro-batch are gathered on every rank
    (2 x tokens x kv_heads x head_dim), and their gradients reduce-scattered. In training neither forward
    nor backward holds positions x positions.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.scale = softmax_scale or config.kv_channels**-0.5
        handle = pg_collection.cp
        self.cp = Group(handle, handle.rank(), handle.size())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [s, b, n, d] or packed [t, n, d]. Returns [s, b, n * d] or [t, n * d]."""
        assert attention_mask is None
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.cp.size == 1:
            return _flat(self._causal(*map(_batch_first, (query, key, value))))
        return self._padded_cp(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention over tensors [b, n, s, d], causal if no mask is given."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )

    def _gather(self, tensor: Tensor) -> Tensor:
        if self.cp.size == 1:
            return tensor
        gathered: Any = gather_from_sequence_parallel_region(
            tensor.contiguous(), tensor_parallel_output_grad=True, group=self.cp.handle
        )
        return gathered

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSequences) -> Tensor:
        key, value = self._gather(key), self._gather(value)
        if packed.mask is not None:
            return attend_masked(query, key, value, packed.mask, self.scale).flatten(1)
        if packed.parts:
            return attend(query, key, value, packed.parts, self.scale).flatten(1)
        output = query.new_zeros(query.shape)
        if packed.generation is not None:
            key, value = self._generated(query, key, value, packed.generation, output)
        for bucket in packed.buckets:
            rows = [t[index].transpose(1, 2) for t, index in
                    ((query, bucket.query), (key, bucket.key), (value, bucket.key))]  # fmt: skip
            attended = self._causal(*rows).transpose(1, 2)
            output = output.index_put((bucket.query[bucket.used],), attended[bucket.used])
        return output.flatten(1)

    def _generated(
        self, query: Tensor, key: Tensor, value: Tensor, generation: Extension, output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend from the rows of a cache, which are extended, and keep what the prompts before them leave.
        Returns keys and values [t, g, d] as the cache holds them."""
        key, value = generation.stored(key), generation.stored(value)
        prompts = slice(generation.prompt_tokens)
        generation.keep(self.layer_number, key[prompts], value[prompts])
        rows = slice(generation.prompt_tokens, None)
        if len(generation.lengths):
            keys, values = generation.extend(self.layer_number, key[rows], value[rows])
            attended = self._attend(query[rows][:, :, None], keys, values, mask=generation.mask)
            output[rows] = attended[:, :, 0]
        return key, value

    def _padded_cp(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = self._gather(key), self._gather(value)
        ranks = [zigzag(key.size(0), self.cp.size, rank) for rank in range(self.cp.size)]
        order = torch.cat(ranks).argsort().to(query.device)
        return _flat(self._causal(*map(_batch_first, (query, key[order], value[order]))))

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over tensors [b, n, s, d], keys and values in order of position; under context
        parallelism the queries are this rank's two chunks of the positions (batching/plan.py)."""
        if self.cp.size == 1:
            return self._attend(query, key, value)
        chunk = key.size(2) // (2 * self.cp.size)
        ends = [(self.cp.rank + 1) * chunk, (2 * self.cp.size - self.cp.rank) * chunk]
        return torch.cat(
            [
                attend_suffix(part, key[:, :, :end], value[:, :, :end], self.scale)
                for part, end in zip(query.chunk(2, 2), ends, strict=True)
            ],
            2,
        )


def _batch_first(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0, 3)


def _flat(attended: Tensor) -> Tensor:
    return attended.permute(2, 0, 1, 3).flatten(2)


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_suffix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of query [b, n, c, d], at the last c positions of key and value [b, g, s, d]; n is a
    multiple of g. Returns [b, n, c, d]. Saves its arguments, the result and a logsumexp per query."""
    if query.is_cuda:
        mask: Any = causal_lower_right(query.size(2), key.size(2))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    output: Any = _Suffix.apply(query, key, value, scale)
    return output


class _Suffix(torch.autograd.Function):
    """Attention to the keys before the first query and to those from there on, combined by their logsumexps.
    Given the combined result and logsumexp, the backward of each part gives its share of the whole gradient
    (as in ring attention, arXiv:2310.01889)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = [
            _forward(query, k, v, 0.0, causal, scale=scale) for k, v, causal in _parts(query, key, value)
        ]
        output, lse = parts[-1]
        if len(parts) == 2:
            earlier, earlier_lse = parts[0]
            lse = torch.logaddexp(lse, earlier_lse)
            weights = [(part_lse - lse).exp().unsqueeze(-1) for _, part_lse in parts]
            output = (weights[0] * earlier + weights[1] * output).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, lse = ctx.saved_tensors
        parts = [
            _backward(grad, query, k, v, output, lse, 0.0, causal, scale=ctx.scale)
            for k, v, causal in _parts(query, key, value)
        ]
        queries, keys, values = zip(*parts)
        return reduce(torch.add, queries), torch.cat(keys, 2), torch.cat(values, 2), None


def _parts(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """(keys, values, whether causal): those before the first query, if any; then those of the queries."""
    before = key.size(2) - query.size(2)
    own = (key[:, :, before:], value[:, :, before:], True)
    return [(key[:, :, :before], value[:, :, :before], False), own] if before else [own]
