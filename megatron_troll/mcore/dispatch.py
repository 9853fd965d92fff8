"""Megatron's all-gather token dispatcher for MoE layers, for ranks that hold different numbers of tokens."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor, nn


class PaddedAllGather(MoEAllGatherTokenDispatcher):
    """All-gather dispatcher that pads the tokens of every rank of the tensor- and expert-parallel group to
    the largest number on any of them; padding is sent to no expert. Each call all-reduces that number, and
    waits for the device."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s, b, h]; routing_map and probs [s * b, E]."""
        tokens, probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.own = len(tokens)
        most = torch.tensor(self.own, device=tokens.device)
        if self.tp_size > 1 or self.ep_size > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.tp_ep_group)
        missing = [0, 0, 0, int(most) - self.own]
        self.routing_map = F.pad(routing_map, missing)
        return F.pad(tokens, missing), F.pad(probs, missing)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        return super().combine_postprocess(hidden_states[: self.own])


def pad_dispatchers(chunk: nn.Module) -> None:
    """Replace the all-gather dispatchers of a chunk; a layer's spec does not choose its dispatcher."""
    for layer in chunk.modules():
        if not isinstance(layer, MoELayer):
            continue
        old = layer.token_dispatcher
        if isinstance(old, MoEAllGatherTokenDispatcher):
            groups = ProcessGroupCollection(ep=old.ep_group, expt_tp=old.tp_group, tp_ep=old.tp_ep_group)
            layer.token_dispatcher = PaddedAllGather(
                old.num_local_experts, old.local_expert_indices, layer.config, groups
            )
