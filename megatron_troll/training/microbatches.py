"""Cut a scored rollout batch into the micro-batches of its optimizer steps, for one model's layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_troll.batching.build import Advantages, Form, build
from megatron_troll.batching.experts import Routing
from megatron_troll.batching.held import HeldBatches, cut, joined
from megatron_troll.batching.plan import Capacity, PlannedStep, UpdateSchedule, plan, step_weights
from megatron_troll.batching.prefixes import Prefixes, shared_prefixes
from megatron_troll.config import Config, Layout
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.router import layer_of, routers
from megatron_troll.objectives.aggregation import Aggregation
from megatron_troll.parallel.groups import Groups
from megatron_troll.rollout.records import share_records
from megatron_troll.types import MicroBatch, Rollout


@dataclass(frozen=True)
class MicroBatcher:
    """Cuts rollout batches for `model`. topk: entries of the engine's record that are packed; 0: none.
    replay: whether the experts of the rollouts are packed, for the routers of this rank."""

    config: Config
    model: MegatronModel
    layout: Layout
    topk: int = 0
    replay: bool = False

    def updates(self, rollouts: Sequence[Rollout], advantages: Advantages, step: int) -> list[HeldBatches]:
        """This rank's micro-batches of every optimizer step. `step` seeds the plan, so that models of any
        layout use the same responses in the same steps. A step in which no token on any rank carries loss is
        empty on every rank: without gradients, an optimizer would still decay weights, and follow its
        momentum.
        """
        train, sampling = self.config.train, self.config.rollout.sampling
        seed = int(np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0])
        schedule = UpdateSchedule(train.updates, train.epochs, seed)
        return self._cut(
            rollouts, advantages, schedule, self.config.objective.aggregation, sampling.temperature
        )

    def once(self, rollouts: Sequence[Rollout], step: int) -> Sequence[MicroBatch]:
        """Micro-batches that hold every response once, cut as by `updates`, for forward passes only."""
        train = self.config.train
        updates = self.updates(rollouts, [0.0] * len(rollouts), step)
        return joined(updates[: train.updates // train.epochs])

    def supervised(self, rollouts: Sequence[Rollout]) -> HeldBatches:
        """This rank's micro-batches of one optimizer step on all `rollouts`, a mean over their tokens; empty
        on every rank if none carries loss."""
        (update,) = self._cut(
            rollouts, [0.0] * len(rollouts), UpdateSchedule(1, 1, seed=0), "token-mean", temperature=1.0
        )
        return update

    def _cut(
        self,
        rollouts: Sequence[Rollout],
        advantages: Advantages,
        schedule: UpdateSchedule,
        aggregation: Aggregation,
        temperature: float,
    ) -> list[HeldBatches]:
        config, groups, form = self.config, self.model.groups, self._form(temperature)
        prefixes = self._prefixes(rollouts)
        arranged = plan(
            [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in rollouts],
            [rollout.group for rollout in rollouts],
            schedule,
            capacity(config, self.layout, groups, form.align),
            [found[0].end if found else 0 for found in prefixes] if form.shared else None,
        )
        length = config.objective.sum_norm_length or config.rollout.sampling.max_tokens
        table = frequencies(rollouts, form.vocab) if config.observe.energy else None
        if self.topk or self.replay:
            mine = {i for update in arranged.steps for chosen in update.ranks[groups.dp.rank] for i in chosen}
            rollouts = share_records(rollouts, sorted(mine), groups)

        def batch(update: PlannedStep, chosen: Sequence[int]) -> MicroBatch:
            weights = step_weights(rollouts, update.responses, aggregation, length)
            built = build(rollouts, advantages, weights, chosen, form, prefixes)
            return built if table is None else replace(built, frequency=table[built.target])

        taken = [carries_loss(rollouts, update) for update in arranged.steps]
        mine = [update.ranks[groups.dp.rank] if take else () for update, take in zip(arranged.steps, taken)]
        built = (batch(update, chosen) for update, own in zip(arranged.steps, mine) for chosen in own)
        return cut(HeldBatches.of(built, device()), [*map(len, mine)])

    def _prefixes(self, rollouts: Sequence[Rollout]) -> list[Prefixes]:
        """The shared prefixes of all rollouts; those of recorded experts are found where the records are."""
        if not self.replay:
            return shared_prefixes(rollouts)
        return self.model.groups.world.first(lambda: shared_prefixes(rollouts, replay=True))

    def _form(self, temperature: float) -> Form:
        return Form.of(
            self.model.groups,
            self.model.shape.vocab,
            packed=self.config.train.packing,
            shared=shares_prefixes(self.config),
            topk=self.topk,
            temperature=temperature,
            routing=routing_of(self.model) if self.replay else None,
        )


def shares_prefixes(config: Config) -> bool:
    """Whether micro-batches read a prefix once for all rollouts that share it."""
    wanted = config.train.share_prefixes
    return wanted if wanted is not None else config.train.packing and device().type == "cpu"


def beyond_budget(rollouts: Sequence[Rollout], token_budget: int) -> str | None:
    """Describe the rollouts that a micro-batch within the budget cannot hold, naming the longest; None if
    there are none."""
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    count = sum(length > token_budget for length in lengths)
    if not count:
        return None
    longest = int(np.argmax(lengths))
    return (
        f"sample {rollouts[longest].name} has {lengths[longest]:,} tokens with its prompt, more than "
        f"train.token_budget={token_budget}: {count} of {len(rollouts)} samples get micro-batches of their "
        "own, over the budget"
    )


def carries_loss(rollouts: Sequence[Rollout], update: PlannedStep) -> bool:
    """Whether any token of an optimizer step carries loss, on whichever rank."""
    return any(bool((rollouts[i].mask > 0).any()) for i in update.responses)


def routing_of(model: MegatronModel) -> Routing:
    """The routers of this rank."""
    shape = model.shape
    return Routing(
        layers=tuple(layer_of(router) for router in routers(model.chunks)),
        model_layers=shape.layers,
        experts=shape.experts,
        per_token=shape.experts_per_token,
        tp_rank=model.groups.tp.rank,
    )


def frequencies(rollouts: Sequence[Rollout], vocab: int) -> Tensor:
    """[V] float32, the share of each token id among the tokens of the batch that carry loss."""
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(r.response_ids[r.mask > 0] for r in rollouts)])
    counts = torch.from_numpy(np.bincount(ids, minlength=vocab))
    return counts.float() / max(1, len(ids))


def capacity(config: Config, layout: Layout, groups: Groups, align: int) -> Capacity:
    """Limits that an optimizer step must fit on this layout."""
    return Capacity(
        dp=groups.dp.size,
        token_budget=config.train.token_budget,
        align=align,
        multiple=groups.pp.size if layout.vpp else 1,
        packed=config.train.packing,
    )
