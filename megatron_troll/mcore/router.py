"""A router that balances its experts over the optimizer step, and reports their loads.

Megatron balances over a micro-batch, or over a running mean of micro-batches; both change with the layout.
Here the loads f_e are counted over the whole step by a forward without gradient, so that
loss = c E / (k T^2) sum_e f_e sum_t p_te (Switch Transformer, arXiv:2101.03961, eq. 4, over the step's T
tokens as in arXiv:2501.11873) is a plain sum over tokens: any layout gives the same gradient. A token of a
prefix that several responses share counts once, not once for each (`MicroBatch.share`), whether each response
reads its own copy or all read one.

Balancing without a loss (arXiv:2408.15664): a bias on each expert's score changes which experts are chosen,
not the weights of the chosen ones; after every step it decreases for experts above the mean load and
increases for experts below it. Megatron has this for sigmoid scores only.

Replay: the experts chosen for each token are recorded in one forward and reused in others. R3
(arXiv:2510.11370) replays the rollout engine's choices in the trainer, R2 those of the policy at the start of
the update (both names: arXiv:2512.01374). Megatron's own replay (moe_enable_routing_replay) uses a global
list of all routers, and supports neither padding nor several models.
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

from megatron_troll.config import MoE
from megatron_troll.parallel.groups import Group, Groups
from megatron_troll.types import SHARES


class StepBalancedRouter(TopKRouter):
    """TopKRouter with both kinds of balancing. Counts are int64, in units of token / SHARES: sums in any
    order are the same, and casting the model leaves them unchanged.

    counts        [E] tokens sent to each expert while `counting`; after `share_counts` the total
    loads         [E] the same in the step's training forwards; after `share_loads` the total
    expert_bias   [E] float32, added to the softmax scores for the choice; part of checkpoints. None: no bias
    coefficient   factor of the balancing loss; 0: no loss
    replay        recorded and replayed choices (`Replay`); loads and the loss use the replayed choices
    left_out      [] tokens of the step's training forwards whose routing was not recorded and not replayed;
                  after `share_loads` the total
    changed       [] replayed choices in the step's training forwards that the router itself did not choose;
                  after `share_loads` the total
    """

    counts: Tensor
    loads: Tensor
    changed: Tensor
    left_out: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("counts", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.register_buffer("loads", torch.zeros(self._experts, dtype=torch.int64), persistent=False)
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("left_out", torch.zeros((), dtype=torch.int64), persistent=False)
        self.counting = False
        self.replay = Replay()
        self.coefficient = 0.0
        self.bias_rate = 0.0

    def configure(self, moe: MoE) -> None:
        """Apply `moe`. Call this before the model is wrapped for data parallelism, which allocates no
        gradient for a frozen weight."""
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
        # Recomputation runs the forward twice, first without gradient: counting only the second counts once.
        training = self.training and torch.is_grad_enabled()
        given = self.replay.take() or Given(None, real[:, 0] * SHARES)
        share = given.share[:, None]
        if given.experts is not None:
            probs, routing_map = self._replayed(rows, given.experts.long(), share, training)
        elif self.expert_bias is None:
            probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        else:
            probs, routing_map = self._weighed(rows, self._own(rows))
        self.replay.record(routing_map, self.topk)
        for wanted, tally in ((self.counting, self.counts), (training, self.loads)):
            if wanted:
                tally += (routing_map * share).sum(0)
        if self.coefficient and training:
            scores = torch.softmax(rows.float(), dim=-1) * (share / SHARES)
            probs = MoEAuxLossAutoScaler.apply(probs, self._loss(scores))
        return probs, routing_map

    @property
    def _experts(self) -> int:
        assert self.config.num_moe_experts is not None
        return self.config.num_moe_experts

    def _own(self, logits: Tensor) -> Tensor:
        """The experts [n, k] that this router itself chooses from logits [n, E]."""
        scores = logits.detach().softmax(-1)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        return scores.topk(self.topk, dim=-1).indices

    def _replayed(
        self, logits: Tensor, given: Tensor, share: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """Route real tokens (`share` [n, 1] not 0) to `given` [n, k]; padding, and tokens whose routing was
        not recorded, to the router's own choice. Returns the same as `_weighed`."""
        own, known, real = self._own(logits), given[:, :1] < self._experts, share > 0
        if training:
            self.changed += ((given[:, :, None] != own[:, None]).all(-1) * known * share).sum()
            self.left_out += (~known * share).sum()
        return self._weighed(logits, torch.where(real & known, given, own))

    def _weighed(self, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """logits [n, E], chosen [n, k] -> probs and map [n, E]. probs equal those of Megatron's router for
        the same choice."""
        weights = logits.softmax(-1).gather(1, chosen)
        if not self.config.moe_router_pre_softmax:
            weights = logits.gather(1, chosen).softmax(-1)
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routing_map

    def _loss(self, scores: Tensor) -> Tensor:
        experts, chosen = self._experts, self.config.moe_router_topk
        counts = self.counts / SHARES
        tokens = counts.sum() / chosen
        scale = self.coefficient * experts / (chosen * tokens.clamp(min=1) ** 2)
        return scale * (counts * scores.sum(0)).sum()


def routers(chunks: list[nn.Module]) -> list[StepBalancedRouter]:
    """Every router of the model's chunks on this rank."""
    return [
        module for chunk in chunks for module in chunk.modules() if isinstance(module, StepBalancedRouter)
    ]


def start_counting(chunks: list[nn.Module]) -> None:
    """Set the counts to zero and count expert loads in the forwards that follow."""
    for router in routers(chunks):
        router.counts.zero_()
        router.counting = True


def share_counts(chunks: list[nn.Module], tp: Group, dp_cp: Group) -> None:
    """Stop counting and sum the loads of each layer over the ranks that saw different tokens. Blocks."""
    for router in routers(chunks):
        router.counting = False
        dp_cp.all_reduce(tp.all_reduce(router.counts))


def start_loads(chunks: list[nn.Module]) -> None:
    """Set to zero the loads of training forwards and what replay changed and left out."""
    for router in routers(chunks):
        for tally in (router.loads, router.changed, router.left_out):
            tally.zero_()


def share_loads(chunks: list[nn.Module], groups: Groups) -> None:
    """Sum the loads and tallies of every layer of this stage over the ranks that saw different tokens,
    in one reduction. Blocks."""
    found = routers(chunks)
    if not found:
        return
    tallies = [[router.changed[None], router.left_out[None]] for router in found]
    total = torch.stack([torch.cat([router.loads, *tally]) for router, tally in zip(found, tallies)])
    groups.dp_cp.all_reduce(groups.tp.all_reduce(total))
    for router, row in zip(found, total):
        router.loads.copy_(row[:-2])
        router.changed.copy_(row[-2])
        router.left_out.copy_(row[-1])


def move_biases(chunks: list[nn.Module]) -> None:
    """Move each bias by the rate: down if the load is above the mean, up if below. Call this after
    `share_loads`; the result is the same on every rank."""
    for router in routers(chunks):
        if router.expert_bias is not None:
            loads = router.loads.double()
            router.expert_bias += router.bias_rate * (loads.mean() - loads).sign().float()


def expert_loads(chunks: list[nn.Module], pp: Group) -> dict[int, Tensor]:
    """{layer, counted from 0: loads [E] float64, in tokens, on the host} for all layers, on every rank.
    Blocks on the pipeline."""
    mine = {layer_of(router): router.loads.cpu().double() / SHARES for router in routers(chunks)}
    return over_stages(mine, pp)


def replay_tallies(chunks: list[nn.Module], pp: Group) -> dict[int, tuple[float, float]]:
    """{layer, counted from 0: choices of the step that replay changed, tokens that it left out} for all
    layers, on every rank. Blocks on the pipeline."""
    mine = {
        layer_of(router): (int(router.changed) / SHARES, int(router.left_out) / SHARES)
        for router in routers(chunks)
    }
    return over_stages(mine, pp)


def layer_of(router: StepBalancedRouter) -> int:
    """Number of the router's layer, counted from 0 over the whole model."""
    assert router.layer_number is not None
    return router.layer_number - 1


def over_stages[Value](mine: Mapping[int, Value], pp: Group) -> dict[int, Value]:
    """Merge the {layer: value} of all stages, sorted by layer, on every rank. Blocks on the pipeline."""
    stages = pp.all_gather_objects(dict(mine))
    return dict(sorted((layer, value) for stage in stages for layer, value in stage.items()))


@contextmanager
def recording(chunks: list[nn.Module]) -> Iterator[dict[int, list[Tensor]]]:
    """Record the choices of this rank's routers in the block: {layer, counted from 0: [n, k] uint8 or uint16,
    ascending, of each forward in order}, on the device."""
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
def routing(chunk: nn.Module, experts: Mapping[int, Tensor] | None, share: Tensor) -> Iterator[None]:
    """Make the routers of `chunk` count the n tokens of the forward in the block as `share` [n] of
    token / SHARES and send them to `experts` (`MicroBatch.experts`), also when that forward is recomputed.
    None: no replay."""
    found = routers([chunk])
    for router in found:
        router.replay.begin(Given(None if experts is None else experts[layer_of(router)], share))
    try:
        yield
    finally:
        for router in found:
            router.replay.end()


@dataclass(frozen=True)
class Given:
    """Orders to a router for the n tokens of one forward.

    experts  [n, k] to which it sends them; None: it chooses itself
    share    [n] integers, what each counts for, in units of token / SHARES; 0 on padding
    """

    experts: Tensor | None
    share: Tensor


@dataclass
class Replay:
    """Choices that one router records, and what it is given.

    recorded  choices [n, k] of each forward; None: nothing is recorded
    given     for the current forward; None: no forward runs, or it is one of generation
    waiting   for forwards that the backward pass will recompute, in order: every schedule runs the backwards
              of a chunk's micro-batches in the order of their forwards
    """

    recorded: list[Tensor] | None = None
    given: Given | None = None
    recomputed: bool = False
    waiting: deque[Given] = field(default_factory=deque)

    def begin(self, given: Given) -> None:
        """Start a forward. If gradients are enabled, a backward will follow."""
        self.given, self.recomputed = given, torch.is_grad_enabled()

    def end(self) -> None:
        self.given = None

    def take(self) -> Given | None:
        """Return what holds for the current call, one outside of a forward being a recomputation."""
        if self.given is None:
            return self.waiting.popleft() if self.waiting else None
        # A checkpointed layer first runs without gradient, then again in backward, which needs the choices.
        if self.recomputed and not torch.is_grad_enabled():
            self.waiting.append(self.given)
        return self.given

    def record(self, routing_map: Tensor, per_token: int) -> None:
        """Record the choices in routing_map [n, E] bool, if recording is on."""
        if self.recorded is None:
            return
        chosen = routing_map.byte().topk(per_token, dim=-1).indices.sort(-1).values
        self.recorded.append(chosen.to(torch.uint8 if routing_map.shape[1] < 256 else torch.uint16))
