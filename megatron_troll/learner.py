"""From a scored rollout batch to optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.plan import Capacity, Schedule, Step, plan
from megatron_troll.batching.weights import step_weights
from megatron_troll.config.tree import Config
from megatron_troll.mcore.parallel import device
from megatron_troll.observe.phases import Phases
from megatron_troll.parallel.groups import Groups
from megatron_troll.trainer import PolicyTrainer
from megatron_troll.types import NO_ID, MicroBatch, Readings, Rollout


@dataclass(frozen=True)
class Learned:
    """What a rollout batch taught: metrics over its updates (means; max and min of those names), how many
    updates were skipped for NaN or Inf, and the rollouts at fault where they are known."""

    metrics: dict[str, float]
    skipped: int
    broken: tuple[int, ...]


@dataclass(frozen=True)
class Learner:
    """Turns rollouts into the optimizer steps that `config.train` asks for."""

    trainer: PolicyTrainer
    config: Config
    phases: Phases

    def learn(self, rollouts: Sequence[Rollout], advantages: Sequence[float], step: int) -> Learned:
        """Train on `rollouts` (the whole batch, on every rank) with one advantage each. `step` seeds the
        plan. Blocks on all ranks."""
        unusable = tuple(i for i, rollout in enumerate(rollouts) if not finite(rollout, self._engine_topk))
        if unusable:
            return Learned({}, self.config.train.updates, unusable)
        updates = self._updates(rollouts, advantages, step)
        with self.phases("old_policy"):
            old = self.trainer.old_readings([batch for update in updates for batch in update])
        if old.broken:
            return Learned({}, len(updates), old.broken)
        rows = [self.trainer.mismatch([batch for update in updates for batch in update], old.readings)]
        broken: set[int] = set()
        for update, readings in zip(updates, _split(old.readings, updates)):
            with self.phases("forward_backward"):
                gradients = self.trainer.accumulate(update, readings)
            with self.phases("optimizer"):
                if not self.trainer.healthy(gradients):
                    broken |= set(self.trainer.agree_on(gradients.broken))
                    continue
                grad_norm = self.trainer.trainable.step()
            rows.append({"loss": gradients.loss, "grad_norm": grad_norm, **gradients.metrics})
        skipped = len(updates) + 1 - len(rows)
        return Learned(combine(rows), skipped, tuple(sorted(broken)))

    def _updates(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], step: int
    ) -> list[list[MicroBatch]]:
        """This rank's micro-batches of every optimizer step."""
        train, groups = self.config.train, self.trainer.trainable.model.groups
        form = self._form(groups)
        lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
        seed = int(np.random.SeedSequence([self.config.seed, step]).generate_state(1)[0])
        arranged = plan(
            lengths,
            [rollout.group for rollout in rollouts],
            Schedule(train.updates, train.epochs, seed),
            capacity(self.config, groups, form.align),
        )
        return [self._micro_batches(rollouts, advantages, update, form, groups) for update in arranged.steps]

    def _micro_batches(
        self,
        rollouts: Sequence[Rollout],
        advantages: Sequence[float],
        update: Step,
        form: Form,
        groups: Groups,
    ) -> list[MicroBatch]:
        objective = self.config.objective
        length = objective.sum_norm_length or self.config.rollout.sampling.max_tokens
        weights = step_weights(rollouts, update.responses, objective.aggregation, length)
        return [
            build(rollouts, advantages, weights, chosen, form).to(device())
            for chosen in update.ranks[groups.dp.rank]
        ]

    def _form(self, groups: Groups) -> Form:
        return Form(
            vocab=self.trainer.trainable.model.shape.vocab,
            packed=self.config.train.packing,
            cp_rank=groups.cp.rank,
            cp_size=groups.cp.size,
            tp_size=groups.tp.size,
            topk=self._engine_topk,
        )

    @property
    def _engine_topk(self) -> int:
        """Entries read of the engine's record; 0: none."""
        objective = self.trainer.objective
        read = objective.reads.at_rollout or objective.reads_old.at_rollout
        return self.config.rollout.top_k if read or self.config.objective.old == "engine" else 0


def capacity(config: Config, groups: Groups, align: int) -> Capacity:
    """What one optimizer step must fit on this layout."""
    return Capacity(
        dp=groups.dp.size,
        token_budget=config.train.token_budget,
        align=align,
        multiple=groups.pp.size if config.policy.layout.vpp else 1,
        packed=config.train.packing,
    )


def finite(rollout: Rollout, topk: int) -> bool:
    """Whether the engine gave every token that carries loss a finite log-prob, and its first `topk` entries
    too."""
    carries_loss = rollout.mask > 0
    if not np.isfinite(rollout.logp[carries_loss]).all():
        return False
    if topk == 0 or rollout.topk is None:
        return True
    ids, logp = rollout.topk.ids[carries_loss, :topk], rollout.topk.logp[carries_loss, :topk]
    return bool(np.isfinite(logp[ids != NO_ID]).all())


def _split(readings: Sequence[Readings], updates: Sequence[Sequence[MicroBatch]]) -> list[list[Readings]]:
    """The old readings of each update; empty lists off the last stage, which holds none."""
    starts = np.cumsum([0, *(len(update) for update in updates)])
    return [list(readings[start : start + len(update)]) for start, update in zip(starts, updates)]


def combine(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """One row from the rows of several updates: the largest of */max, the smallest of */min, else the mean
    over the rows that have the name."""
    named: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            named.setdefault(name, []).append(value)
    return {name: _together(name, values) for name, values in named.items()}


def _together(name: str, values: list[float]) -> float:
    if name.endswith("/max"):
        return max(values)
    if name.endswith("/min"):
        return min(values)
    return sum(values) / len(values)
