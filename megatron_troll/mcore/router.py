"""A router whose load-balancing loss is global over the optimizer step.

Megatron balances over a micro-batch, or over a running mean of micro-batches; both change with the layout.
Here the loads f_e are counted over the whole step by a forward without gradient, so that
loss = c E / (k T^2) sum_e f_e sum_t p_te (Switch Transformer, arXiv:2101.03961, eq. 4, over the step's T
tokens as in arXiv:2501.11873) is a plain sum over tokens: any layout gives the same gradient.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_troll.parallel.groups import Group


class StepBalancedRouter(TopKRouter):
    """TopKRouter plus the step-wide balancing loss.

    counts    [E] float32, tokens sent to each expert while `counting`; after `share_counts` the total
    coefficient   of the loss; 0 adds nothing
    """

    counts: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("counts", torch.zeros(self._experts), persistent=False)
        self.counting = False
        self.coefficient = 0.0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [s, b, E]; padding_mask [s, b], True on padding. Returns probs and map, [s * b, E]."""
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        real = torch.ones_like(routing_map[:, :1]) if padding_mask is None else ~padding_mask.reshape(-1, 1)
        if self.counting:
            self.counts += (routing_map & real).sum(0)
        if self.coefficient and self.training and torch.is_grad_enabled():
            scores = torch.softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1) * real
            probs = MoEAuxLossAutoScaler.apply(probs, self._loss(scores))
        return probs, routing_map

    @property
    def _experts(self) -> int:
        assert self.config.num_moe_experts is not None
        return self.config.num_moe_experts

    def _loss(self, scores: Tensor) -> Tensor:
        experts, chosen = self._experts, self.config.moe_router_topk
        tokens = self.counts.sum() / chosen
        scale = self.coefficient * experts / (chosen * tokens.clamp(min=1) ** 2)
        return scale * (self.counts * scores.sum(0)).sum()


def routers(chunks: list[nn.Module]) -> list[StepBalancedRouter]:
    """Every router of the model's chunks on this rank."""
    return [
        module for chunk in chunks for module in chunk.modules() if isinstance(module, StepBalancedRouter)
    ]


def start_counting(chunks: list[nn.Module]) -> None:
    """Count expert loads from zero in the forwards that follow."""
    for router in routers(chunks):
        router.counts.zero_()
        router.counting = True


def share_counts(chunks: list[nn.Module], tp: Group, dp_cp: Group) -> None:
    """Stop counting and sum the loads of each layer over the ranks that saw different tokens. Blocks."""
    for router in routers(chunks):
        router.counting = False
        dp_cp.all_reduce(tp.all_reduce(router.counts))
