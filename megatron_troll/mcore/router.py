"""A router that is balanced over the optimizer step, and tells how busy its experts were.

Megatron balances over a micro-batch, or over a running mean of micro-batches; both change with the layout.
Here the loads f_e are counted over the whole step by a forward without gradient, so that
loss = c E / (k T^2) sum_e f_e sum_t p_te (Switch Transformer, arXiv:2101.03961, eq. 4, over the step's T
tokens as in arXiv:2501.11873) is a plain sum over tokens: any layout gives the same gradient.

Balancing without a loss (arXiv:2408.15664): a bias on each expert's score moves the choice, not the weights
of the chosen; after every step it falls for experts with more than the mean load and rises for the others.
Megatron has this for sigmoid scores only.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_troll.config.model_options import MoE
from megatron_troll.parallel.groups import Group, Groups


class StepBalancedRouter(TopKRouter):
    """TopKRouter with both balancings. Counts are int64, which no change of the model's dtype touches.

    counts        [E] tokens sent to each expert while `counting`; after `share_counts` the total
    loads         [E] the same of the step's training forwards; after `share_loads` the total
    expert_bias   [E] float32, added to the softmax scores for the choice; part of checkpoints. None: no bias
    coefficient   of the loss; 0 adds nothing
    """

    counts: Tensor
    loads: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("counts", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.register_buffer("loads", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.counting = False
        self.coefficient = 0.0
        self.bias_rate = 0.0

    def configure(self, moe: MoE) -> None:
        """Before the model is wrapped for data parallelism, which holds no gradient of a frozen weight."""
        self.coefficient, self.bias_rate = moe.aux_loss, moe.bias_rate
        self.weight.requires_grad_(not moe.freeze_router)
        if moe.bias_rate:
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(self._experts))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [s, b, E] float32; padding_mask [s, b], True on padding. Returns probs, map [s * b, E]."""
        if self.expert_bias is None:
            probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        else:
            probs, routing_map = self._biased(logits.reshape(-1, self._experts))
        real = torch.ones_like(routing_map[:, :1]) if padding_mask is None else ~padding_mask.reshape(-1, 1)
        # Recompute runs a forward without gradient first: what is counted with gradient is counted once.
        training = self.training and torch.is_grad_enabled()
        for wanted, tally in ((self.counting, self.counts), (training, self.loads)):
            if wanted:
                tally += (routing_map & real).sum(0)
        if self.coefficient and training:
            scores = torch.softmax(logits.reshape(-1, logits.shape[-1]).float(), dim=-1) * real
            probs = MoEAuxLossAutoScaler.apply(probs, self._loss(scores))
        return probs, routing_map

    @property
    def _experts(self) -> int:
        assert self.config.num_moe_experts is not None
        return self.config.num_moe_experts

    def _biased(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [n, E] -> probs, which are those of Megatron's router for the same choice, and map."""
        assert self.expert_bias is not None
        scores = logits.softmax(-1)
        chosen = (scores.detach() + self.expert_bias).topk(self.topk, dim=-1).indices
        weights = scores.gather(1, chosen)
        if not self.config.moe_router_pre_softmax:
            weights = logits.gather(1, chosen).softmax(-1)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routing_map

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


def start_loads(chunks: list[nn.Module]) -> None:
    """Count the loads of training forwards from zero."""
    for router in routers(chunks):
        router.loads.zero_()


def share_loads(chunks: list[nn.Module], groups: Groups) -> None:
    """Sum the loads of every layer of this stage over the ranks that saw different tokens, in one reduction.
    Blocks."""
    found = routers(chunks)
    if not found:
        return
    total = torch.stack([router.loads for router in found])
    groups.dp_cp.all_reduce(groups.tp.all_reduce(total))
    for router, loads in zip(found, total):
        router.loads.copy_(loads)


def move_biases(chunks: list[nn.Module]) -> None:
    """After `share_loads`: each bias moves by the rate, down where the load is above the mean. The same on
    every rank."""
    for router in routers(chunks):
        if router.expert_bias is not None:
            loads = router.loads.double()
            router.expert_bias += router.bias_rate * (loads.mean() - loads).sign().float()


def expert_loads(chunks: list[nn.Module], pp: Group) -> dict[int, Tensor]:
    """Layer, counted from 0 -> loads [E] int64 on the host, of every layer on every rank. Blocks on the
    pipeline."""
    mine = {}
    for router in routers(chunks):
        assert router.layer_number is not None
        mine[router.layer_number - 1] = router.loads.to("cpu", copy=True)
    stages = pp.all_gather_objects(mine)
    return dict(sorted((layer, loads) for stage in stages for layer, loads in stage.items()))
