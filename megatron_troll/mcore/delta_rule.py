"""The gated delta rule (Gated Delta Networks, arXiv:2412.06464), in chunks and step by step.

With log-decay g_t <= 0, keys and queries of length 1 and 0 < beta_t < 1, each value head keeps a matrix S:

    S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - (e^{g_t} S_{t-1})^T k_t)^T        o_t = S_t^T q_t / sqrt(d_k)

`chunked` computes the same for C positions at once. With G the sum of g from the chunk's start, the written
values u_i solve a triangular system (the WY form of the products of I - beta k k^T):

    u_i = beta_i (v_i - e^{G_i} S^T k_i - sum_{j<i} e^{G_i - G_j} (k_i . k_j) u_j)

so that only the state is passed from chunk to chunk. No exponent is positive.

Shapes: query and key [B, L, Hk, Dk]; value [B, L, Hv, Dv], where Hv / Hk neighbouring value heads share a key
head; decay and beta [B, L, Hv]; state [B, Hv, Dk, Dv] in fp32 or wider, None for zeros. `chunked` and
`recurrent` return the output [B, L, Hv, Dv] in the dtype of `value` and the state after the last position.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_troll.mcore.packing import Flat
from megatron_troll.mcore.version import check_linear_attention, linear_attention

CHUNK = 64
NORM_EPS = 1e-6
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
FlatRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Flat], Tensor]


@dataclass(frozen=True)
class Kernels:
    """Fused kernels of the rule: in chunks, step by step (no backward), and in chunks over the sequences of a
    `Flat`, with inputs [1, T, ...] and initial states of zero."""

    chunked: Rule
    recurrent: Rule
    flat: FlatRule


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply the rule with the kernels from `kernels_for` if there are any, otherwise exactly, in torch. A
    decode step uses the recurrent form, everything else the chunked form."""
    kernels = kernels_for(value.device, value.dtype)
    if value.shape[1] == 1 and not torch.is_grad_enabled():
        rule = kernels.recurrent if kernels else recurrent
    else:
        rule = kernels.chunked if kernels else chunked
    return rule(query, key, value, decay, beta, state)


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Describe in words which implementation `delta_rule` uses, and why."""
    if not _takes_kernels(device, dtype):
        return "linear attention: the exact rule in torch; flash-linear-attention is for CUDA and bf16"
    if kernels_for(device, dtype) is None:
        return (
            "linear attention: the exact rule in torch, which is slow; `pip install flash-linear-attention` "
            "brings kernels"
        )
    return "linear attention: flash-linear-attention's kernels"


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Kernels of flash-linear-attention, for CUDA and any dtype but fp32; None otherwise, or if it is not
    installed. Raises ValueError if it is too old."""
    return _flash_linear_attention() if _takes_kernels(device, dtype) else None


def _takes_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype != torch.float32


@functools.cache
def _flash_linear_attention() -> Kernels | None:
    if importlib.util.find_spec("fla") is None:
        return None
    check_linear_attention(linear_attention())
    from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
    )

    def adapted(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Rule:
        def rule(
            query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            return kernel(
                query.to(value.dtype),
                key.to(value.dtype),
                value,
                g=decay,
                beta=beta,
                initial_state=state,
                output_final_state=True,
            )

        return rule

    def flat(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, packed: Flat) -> Tensor:
        return chunk_gated_delta_rule(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            g=decay,
            beta=beta,
            cu_seqlens=packed.starts,
            cu_seqlens_cpu=packed.starts_cpu,  # otherwise the kernel reads it from the device
        )[0]

    return Kernels(adapted(chunk_gated_delta_rule), adapted(fused_recurrent_gated_delta_rule), flat)


def unit(vectors: Tensor) -> Tensor:
    """`vectors` divided by their length along the last axis, in fp32 or wider."""
    vectors = wide(vectors)
    return vectors * torch.rsqrt(vectors.pow(2).sum(-1, keepdim=True) + NORM_EPS)


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in fp32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Apply the rule in chunks of `size` positions. Holds 4 x B x Hv x L x size and a few copies of the
    inputs, and for backward one state per chunk."""
    length, heads = value.shape[1], key.shape[2]
    size = min(size, length)
    q, k, v = (_in_chunks(_grouped(tensor, heads), size) for tensor in (query, key, value))
    g, b = (_in_chunks(_grouped(tensor[..., None], heads), size) for tensor in (decay, beta))
    q, since = q * q.shape[-1] ** -0.5, g.cumsum(-2)
    later = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    between = (since - since.mT).masked_fill(later, float("-inf")).exp()
    system, inside = (b * k) @ k.mT * between, q @ k.mT * between
    # `written`: the values if the state before the chunk were zero; `taken` @ state is subtracted from them.
    written, taken = torch.linalg.solve_triangular(
        system, torch.cat([b * v, b * k * since.exp()], -1), upper=False, unitriangular=True
    ).split([v.shape[-1], k.shape[-1]], -1)
    across, kept = q * since.exp(), since[..., -1:, :].exp()
    stored = k * (since[..., -1:, :] - since).exp()
    memory, outputs = _start(state, k, v), []
    # unbind, because in backward each indexing operation would allocate a tensor of all chunks.
    chunks = (tensor.unbind(3) for tensor in (written, taken, across, inside, kept, stored))
    for write, take, read, mix, keep, store in zip(*chunks, strict=True):
        new = write - take @ memory
        outputs.append(read @ memory + mix @ new)
        memory = keep * memory + store.mT @ new
    output = _ungrouped(torch.cat(outputs, 3))[:, :length]
    return output.to(value.dtype), memory.flatten(1, 2)


def recurrent(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Apply the rule position by position."""
    heads = key.shape[2]
    q, k, v = (_grouped(tensor, heads) for tensor in (query, key, value))
    g, b = (_grouped(tensor[..., None], heads) for tensor in (decay, beta))
    q = q * q.shape[-1] ** -0.5
    memory, outputs = _start(state, k, v), []
    for i in range(v.shape[3]):
        at = slice(i, i + 1)
        memory = g[:, :, :, at].exp() * memory
        new = b[:, :, :, at] * (v[:, :, :, at] - k[:, :, :, at] @ memory)
        memory = memory + k[:, :, :, at].mT @ new
        outputs.append(q[:, :, :, at] @ memory)
    return _ungrouped(torch.cat(outputs, 3)).to(value.dtype), memory.flatten(1, 2)


def _grouped(tensor: Tensor, key_heads: int) -> Tensor:
    """[B, L, H, D] -> [B, Hk, H / Hk, L, D], in fp32 or wider."""
    return wide(tensor).unflatten(2, (key_heads, -1)).movedim(1, 3)


def _ungrouped(output: Tensor) -> Tensor:
    """[B, Hk, Hv / Hk, L, D] -> [B, L, Hv, D]."""
    return output.movedim(3, 1).flatten(2, 3)


def _in_chunks(tensor: Tensor, size: int) -> Tensor:
    """[.., L, D] -> [.., N, size, D]. Padding neither decays the state nor writes to it."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[3] % size)).unflatten(3, (-1, size))


def _start(state: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
    """The state [B, Hk, Hv / Hk, Dk, Dv] before the first position."""
    batch, heads, group = value.shape[:3]
    if state is None:
        return value.new_zeros(batch, heads, group, key.shape[-1], value.shape[-1])
    return state.to(value.dtype).unflatten(1, (heads, group))
