"""A router that is balanced over the optimizer step, and tells how busy its experts were.

Megatron balances over a micro-batch, or over a running mean of micro-batches; both change with the layout.
Here the loads f_e are counted over the whole step by a forward without gradient, so that
loss = c E / (k T^2) sum_e f_e sum_t p_te (Switch Transformer, arXiv:2101.03961, eq. 4, over the step's T
tokens as in arXiv:2501.11873) is a plain sum over tokens: any layout gives the same gradient.

Balancing without a loss (arXiv:2408.15664): a bias on each expert's score moves the choice, not the weights
of the chosen; after every step it falls for experts with more than the mean load and rises for the others.
Megatron has this for sigmoid scores only.

Replay: which experts tokens go to, recorded in one forward and repeated in others. R3 (arXiv:2510.11370)
repeats the rollout engine's choices in the trainer, R2 those of the policy at the start of the update (both
names: arXiv:2512.01374). Megatron's switch (moe_enable_routing_replay) is a global list of all routers,
which knows neither padding nor several models.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    replay        what is recorded and replayed (replay.py); loads and the loss go by the replayed choices
    changed       [] choices of the step's training forwards that replay made other than the router's own;
                  after `share_loads` the total
    """

    counts: Tensor
    loads: Tensor
    changed: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("counts", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.register_buffer("loads", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64), persistent=False)
        self.counting = False
        self.replay = Replay()
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
        rows = logits.reshape(-1, self._experts)
        real = torch.ones_like(rows[:, :1], dtype=torch.bool)
        if padding_mask is not None:
            real = ~padding_mask.reshape(-1, 1)
        # Recompute runs a forward without gradient first: what is counted with gradient is counted once.
        training = self.training and torch.is_grad_enabled()
        given = self.replay.take()
        if given is not None:
            probs, routing_map = self._replayed(rows, given.long(), real, training)
        elif self.expert_bias is None:
            probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        else:
            probs, routing_map = self._weighed(rows, self._own(rows))
        self.replay.record(routing_map, self.topk)
        for wanted, tally in ((self.counting, self.counts), (training, self.loads)):
            if wanted:
                tally += (routing_map & real).sum(0)
        if self.coefficient and training:
            scores = torch.softmax(rows.float(), dim=-1) * real
            probs = MoEAuxLossAutoScaler.apply(probs, self._loss(scores))
        return probs, routing_map

    @property
    def _experts(self) -> int:
        assert self.config.num_moe_experts is not None
        return self.config.num_moe_experts

    def _own(self, logits: Tensor) -> Tensor:
        """The experts [n, k] that this router chooses from logits [n, E]."""
        scores = logits.detach().softmax(-1)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        return scores.topk(self.topk, dim=-1).indices

    def _replayed(self, logits: Tensor, given: Tensor, real: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """`given` [n, k] where `real` [n, 1], its own choice on padding. Returns like `_weighed`."""
        own = self._own(logits)
        if training:
            self.changed += ((given[:, :, None] != own[:, None]).all(-1) & real).sum()
        return self._weighed(logits, torch.where(real, given, own))

    def _weighed(self, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """logits [n, E], chosen [n, k] -> probs, which are those of Megatron's router for the same choice,
        and map."""
        weights = logits.softmax(-1).gather(1, chosen)
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
    """Count the loads of training forwards, and what replay changes of them, from zero."""
    for router in routers(chunks):
        router.loads.zero_()
        router.changed.zero_()


def share_loads(chunks: list[nn.Module], groups: Groups) -> None:
    """Sum the loads of every layer of this stage over the ranks that saw different tokens, in one reduction.
    Blocks."""
    found = routers(chunks)
    if not found:
        return
    total = torch.stack([torch.cat([router.loads, router.changed[None]]) for router in found])
    groups.dp_cp.all_reduce(groups.tp.all_reduce(total))
    for router, row in zip(found, total):
        router.loads.copy_(row[:-1])
        router.changed.copy_(row[-1])


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
    mine = {layer_of(router): router.loads.to("cpu", copy=True) for router in routers(chunks)}
    return over_stages(mine, pp)


def replay_changes(chunks: list[nn.Module], pp: Group) -> dict[int, int]:
    """Layer, counted from 0 -> choices of the step that replay changed, of every layer on every rank. Blocks
    on the pipeline."""
    return over_stages({layer_of(router): int(router.changed) for router in routers(chunks)}, pp)


def layer_of(router: StepBalancedRouter) -> int:
    """Counted from 0 over the whole model."""
    assert router.layer_number is not None
    return router.layer_number - 1


def over_stages[Value](mine: Mapping[int, Value], pp: Group) -> dict[int, Value]:
    """What every stage has of its layers, in their order, on every rank. Blocks on the pipeline."""
    stages = pp.all_gather_objects(dict(mine))
    return dict(sorted((layer, value) for stage in stages for layer, value in stage.items()))


@contextmanager
def recording(chunks: list[nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """What the routers on this rank choose in the block: layer, counted from 0 -> [n, k] uint8 or uint16,
    ascending, of each forward in order, on the device."""
    found = routers(chunks)
    kept: dict[int, list[Tensor]] = {layer_of(router): [] for router in found}
    for router in found:
        router.replay.recorded = kept[layer_of(router)]
    try:
        yield kept
    finally:
        for router in found:
            router.replay.recorded = None


@contextmanager
def replaying(chunk: nn.Module, experts: Mapping[int, Tensor] | None) -> Iterator[None]:
    """The routers of `chunk` send the tokens of the forward in the block to `experts`
    (`MicroBatch.experts`), and again where that forward is recomputed."""
    found = routers([chunk]) if experts is not None else []
    for router in found:
        assert experts is not None
        router.replay.begin(experts[layer_of(router)])
    try:
        yield
    finally:
        for router in found:
            router.replay.end()


@dataclass
class Replay:
    """What one router records and repeats.

    recorded  choices [n, k] of each forward; None: not recorded
    given     choices [n, k] for the forward that runs; None: no such forward runs, or it chooses itself
    waiting   those of forwards that the backward pass will recompute. Every schedule goes backward through a
              chunk's micro-batches in the order of their forwards.
    """

    recorded: list[Tensor] | None = None
    given: Tensor | None = None
    recomputed: bool = False
    waiting: deque[Tensor] = field(default_factory=deque)

    def begin(self, experts: Tensor) -> None:
        """Before a forward; whether gradients are on says whether there will be a backward."""
        self.given, self.recomputed = experts, torch.is_grad_enabled()

    def end(self) -> None:
        self.given = None

    def take(self) -> Tensor | None:
        """The choices that the router has to repeat now. Outside of a forward it is called by recompute."""
        if self.given is None:
            return self.waiting.popleft() if self.waiting else None
        # A checkpointed layer runs without gradient first.
        if self.recomputed and not torch.is_grad_enabled():
            self.waiting.append(self.given)
        return self.given

    def record(self, routing_map: Tensor, per_token: int) -> None:
        """routing_map [n, E] bool."""
        if self.recorded is None:
            return
        chosen = routing_map.byte().topk(per_token, dim=-1).indices.sort(-1).values
        self.recorded.append(chosen.to(torch.uint8 if routing_map.shape[1] <= 256 else torch.uint16))
