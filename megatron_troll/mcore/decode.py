"""Forwards of the training model that read prompts and extend sequences, for generation in the trainer's own
processes.

A forward has the tokens of new prompts and one token of each sequence under way, end to end in one packed
row. A prompt is read once for all that start behind it. Sequence parallelism is off during generation,
because few tokens would be left to a rank. Context parallelism is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_troll.config import ConfigError
from megatron_troll.mcore.kv_cache import KvCache, Prefix
from megatron_troll.mcore.model import MegatronModel, bare
from megatron_troll.mcore.packing import PackedSequences, generating
from megatron_troll.mcore.parallel import device

SWITCHED_OFF = ("training", "sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generation_mode(model: MegatronModel) -> Iterator[None]:
    """Switch to evaluation mode, without gradients and sequence parallelism. Everything is restored at the
    end."""
    if model.groups.cp.size > 1:
        raise ConfigError(
            f"the in-process engine does not generate under context parallelism (cp={model.groups.cp.size}): "
            "set models.policy.layout.cp=1"
        )
    modules = [module for chunk in model.chunks for module in chunk.modules()]
    switches = _true_switches([*modules, model.config])
    try:
        for owner, attribute in switches:
            setattr(owner, attribute, False)
        with torch.no_grad():
            yield
    finally:
        for owner, attribute in switches:
            setattr(owner, attribute, True)


def _true_switches(owners: list[object]) -> list[tuple[object, str]]:
    return [
        (owner, attribute)
        for owner in owners
        for attribute in SWITCHED_OFF
        if getattr(owner, attribute, None) is True
    ]


class Decoder:
    """The sequences under way inside `generation_mode`, a row each, and their cache (2 x layers of full
    attention x rows x max_length x kv_heads / tp x head_dim on each pipeline stage, and a
    `gated_delta_net.Memory` a row for each layer of linear attention). For fp8_e4m3, keys and values are
    rounded to that format with scale 1 (saturating) after the rotary embedding, as servers store them; the
    memories of linear attention stay fp32."""

    def __init__(
        self, model: MegatronModel, rows: int, max_length: int, kv_cache: Literal["auto", "fp8_e4m3"] = "auto"
    ) -> None:
        """max_length counts prompt and answer."""
        self.model = model
        self.tokens_read = 0
        self.cache = KvCache(rows, max_length, fp8=kv_cache == "fp8_e4m3")

    def extend(self, prompts: Sequence[np.ndarray], tokens: Tensor) -> tuple[list[Prefix], Tensor | None]:
        """Read `prompts`, and extend every row by its token of `tokens` [B]. Returns the prompts as prefixes
        behind which rows can start (`cache.add`), and the hidden states [B, h] of the rows on the last
        pipeline stage, None on others. `tokens_read` grows by all tokens, those of the prompts first. There
        must be a prompt or a row. Blocks on the pipeline."""
        ids = torch.cat([*(torch.from_numpy(prompt).long().to(device()) for prompt in prompts), tokens])
        firsts = self.tokens_read + np.cumsum([0, *map(len, prompts)])
        prefixes = [Prefix(len(prompt), int(first)) for prompt, first in zip(prompts, firsts)]
        packed = generating(self.cache, prefixes, device())
        hidden = self._through_stages(ids[None], packed)
        self.tokens_read += len(ids)
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        if hidden is None:
            return prefixes, None
        for prefix in prefixes:
            prefix.hidden = hidden[prefix.first - int(firsts[0]) + prefix.length - 1, 0]
        return prefixes, hidden[len(ids) - len(tokens) :, 0]

    def _through_stages(self, ids: Tensor, packed: PackedSequences) -> Tensor | None:
        """Hidden states [t, 1, h] of tokens ids [1, t] on the last pipeline stage, None on others."""
        hidden: Tensor | None = None
        pp, stages = self.model.groups.pp, self.model.groups.pp.size * len(self.model.chunks)
        for stage in range(stages):
            if stage % pp.size != pp.rank:
                continue
            chunk = self.model.chunks[stage // pp.size]
            if stage > 0 and pp.size > 1:
                hidden = self._receive(ids)
            hidden = self._forward(chunk, hidden, ids, packed)
            if stage < stages - 1 and pp.size > 1:
                dist.send(hidden.contiguous(), group=pp.handle, group_dst=(pp.rank + 1) % pp.size)
        return hidden if self.model.groups.is_last_stage else None

    def _forward(
        self, chunk: nn.Module, received: Tensor | None, ids: Tensor, packed: PackedSequences
    ) -> Tensor:
        stage = bare(chunk)
        stage.set_input_tensor(received)  # pyright: ignore[reportArgumentType]
        assert packed.position is not None
        hidden = chunk(ids, packed.position[None], None, packed_seq_params=packed)
        self.model.progress()
        return hidden

    def _receive(self, ids: Tensor) -> Tensor:
        pp = self.model.groups.pp
        shape = (ids.shape[1], 1, self.model.shape.hidden)
        hidden = torch.empty(shape, dtype=self.model.config.params_dtype, device=ids.device)
        dist.recv(hidden, group=pp.handle, group_src=(pp.rank - 1) % pp.size)
        return hidden
