"""KV-cached forwards of the training model, for generation in the trainer's own processes.

One batch of left-padded prompts is prefilled, then extended token by token. Rotary embeddings depend only on
distances, so left padding only changes which keys are hidden. Sequence parallelism is off during generation,
because a decode step has only one position to shard. Context parallelism is refused. Linear attention layers
keep a state instead of keys and values; padding does not change it (gated_delta_net.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor, nn

from megatron_troll.config import ConfigError
from megatron_troll.mcore.attention import CachedSelfAttention
from megatron_troll.mcore.model import MegatronModel, bare

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SWITCHED_OFF = ("training", "sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generation_mode(model: MegatronModel, kv_cache: Literal["auto", "fp8_e4m3"]) -> Iterator[None]:
    """Switch to evaluation mode, without gradients and sequence parallelism. For fp8_e4m3, keys and values
    are rounded to that format with scale 1 (saturating) as they enter the cache; the states of linear
    attention stay fp32. Everything is restored at the end.

    Servers with such a cache store keys after the rotary embedding. Here they are rounded before it: after
    it, the rounding would depend on the padding of a row, and so the sampled tokens on the layout.
    """
    if model.groups.cp.size > 1:
        raise ConfigError(
            f"the in-process engine does not generate under context parallelism (cp={model.groups.cp.size}): "
            "set models.policy.layout.cp=1"
        )
    modules = [module for chunk in model.chunks for module in chunk.modules()]
    switches = _true_switches([*modules, model.config])
    attentions = [module for module in modules if isinstance(module, CachedSelfAttention)]
    try:
        for owner, attribute in switches:
            setattr(owner, attribute, False)
        for attention in attentions:
            attention.stored = round_to_fp8 if kv_cache == "fp8_e4m3" else None
        with torch.no_grad():
            yield
    finally:
        for attention in attentions:
            attention.stored = None
        for owner, attribute in switches:
            setattr(owner, attribute, True)


def _true_switches(owners: list[object]) -> list[tuple[object, str]]:
    return [
        (owner, attribute)
        for owner in owners
        for attribute in SWITCHED_OFF
        if getattr(owner, attribute, None) is True
    ]


def round_to_fp8(tensor: Tensor) -> Tensor:
    """Round to the nearest float8_e4m3fn values, saturating, in the tensor's own dtype. Idempotent."""
    return tensor.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(tensor.dtype)


class Decoder:
    """The state of one batch inside `generation_mode`: which of its first positions are padding, its KV cache
    (2 x layers of full attention x max_length x B x kv_heads / tp x head_dim on each pipeline stage), and a
    `gated_delta_net.Memory` for each layer of linear attention."""

    def __init__(self, model: MegatronModel, padding: Tensor, max_length: int) -> None:
        """padding [B, P] bool, True on left padding; max_length counts prompt and answer."""
        self.model = model
        self.context = StaticInferenceContext(padding.shape[0], max_length)
        self.padding = torch.zeros(padding.shape[0], max_length, dtype=torch.bool, device=padding.device)
        self.padding[:, : padding.shape[1]] = padding

    def extend(self, tokens: Tensor) -> Tensor | None:
        """Append tokens [B, s] (the padded prompts first, then one per call). Returns the hidden states
        [B, h] of the last position on the last pipeline stage, None on others. Blocks on the pipeline."""
        start = self.context.sequence_len_offset
        end = start + tokens.shape[1]
        positions = torch.arange(start, end, device=tokens.device).expand_as(tokens)
        mask = self._mask(start, end)
        hidden: Tensor | None = None
        pp, stages = self.model.groups.pp, self.model.groups.pp.size * len(self.model.chunks)
        for stage in range(stages):
            if stage % pp.size != pp.rank:
                continue
            chunk = self.model.chunks[stage // pp.size]
            if stage > 0 and pp.size > 1:
                hidden = self._receive(tokens, chunk)
            hidden = self._forward(chunk, hidden, tokens, positions, mask)
            if stage < stages - 1 and pp.size > 1:
                dist.send(hidden.contiguous(), group=pp.handle, group_dst=(pp.rank + 1) % pp.size)
        self.context.sequence_len_offset = end
        return hidden[-1] if self.model.groups.is_last_stage and hidden is not None else None

    def _forward(
        self, chunk: nn.Module, received: Tensor | None, tokens: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        stage = bare(chunk)
        stage.set_input_tensor(received)  # pyright: ignore[reportArgumentType]
        hidden = chunk(tokens, positions, mask, inference_context=self.context)
        self.model.progress()
        return hidden

    def _receive(self, tokens: Tensor, chunk: nn.Module) -> Tensor:
        pp = self.model.groups.pp
        shape = (tokens.shape[1], tokens.shape[0], self.model.shape.hidden)
        hidden = torch.empty(shape, dtype=self.model.config.params_dtype, device=tokens.device)
        dist.recv(hidden, group=pp.handle, group_src=(pp.rank - 1) % pp.size)
        return hidden

    def _mask(self, start: int, end: int) -> Tensor:
        """Mask [B, 1, end - start, end], True on hidden keys: later ones and padding. A padding query sees
        itself, so that no row is empty."""
        query = torch.arange(start, end, device=self.padding.device)[:, None]
        key = torch.arange(end, device=self.padding.device)
        hidden = (key > query) | (self.padding[:, None, :end] & (key != query))
        return hidden[:, None]
