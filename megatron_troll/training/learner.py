"""The optimizer steps of one rollout batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.batching.build import Advantages
from megatron_troll.batching.waiting import joined
from megatron_troll.observe.phases import Phases
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import ReferenceOutputs
from megatron_troll.training.trainer import OldPolicyOutputs, PolicyTrainer
from megatron_troll.types import NO_ID, MicroBatch, Rollout


@dataclass(frozen=True)
class UpdateResult:
    """Result of training on a rollout batch: metrics over its updates (means; max and min for names that end
    in these), the number of updates skipped for NaN or Inf, the rollouts at fault if they are known, and the
    number of updates without a token that carries loss."""

    metrics: dict[str, float]
    skipped: int
    broken: tuple[int, ...]
    masked: int = 0


@dataclass(frozen=True)
class Learner:
    """Turns rollouts into the optimizer steps that `config.train` asks for."""

    trainer: PolicyTrainer
    batcher: MicroBatcher
    phases: Phases

    def learn(self, rollouts: Sequence[Rollout], advantages: Advantages, step: int) -> UpdateResult:
        """Train on `rollouts` (the whole batch, on every rank). `step` seeds the plan. Blocks on every
        rank."""
        # Rank 0 has the engine's records of all rollouts.
        unusable = self.trainer.trainable.model.groups.world.first(
            lambda: tuple(i for i, rollout in enumerate(rollouts) if not finite(rollout, self.batcher.topk))
        )
        if unusable:
            return UpdateResult({}, self.batcher.config.train.updates, unusable)
        planned = self.batcher.updates(rollouts, advantages, step)
        updates = [update for update in planned if update]
        masked = len(planned) - len(updates)
        if not updates:
            return UpdateResult({}, 0, (), masked)
        # The first update's forward reads the old policy too: no step has moved the weights before it.
        first = 1 if self.trainer.old == "trainer" else 0
        every = joined(updates)
        later = every[sum(map(len, updates[:first])) :]
        with self.phases("old_policy"):
            old = self.trainer.old_readings(later) if later else OldPolicyOutputs([], (), [])
        if old.broken:
            return UpdateResult({}, len(updates), old.broken, masked)
        kept = split(self._references(every), updates)
        steps = [*updates[:first], *split(old.batches, updates[first:])]
        readings = [*[None] * first, *split(old.readings, updates[first:])]
        rows = [self.trainer.spared(every)]
        broken: set[int] = set()
        for number, (update, before, references) in enumerate(zip(steps, readings, kept)):
            with self.phases("forward_backward"):
                gradients = self.trainer.accumulate(update, before, references)
            if number == 0:
                found = gradients.old if first else []
                unusable = self.trainer.unusable(update, found)
                if unusable:
                    return UpdateResult({}, len(updates), unusable, masked)
                rows[0] |= self.trainer.mismatch(every, [*found, *old.readings])
            with self.phases("optimizer"):
                grad_norm = self.trainer.trainable.step_if_finite(gradients.loss)
                if grad_norm is None:
                    broken |= set(self.trainer.agree_on(gradients.broken))
                    continue
            rows.append({"loss": gradients.loss, "grad_norm": grad_norm, **gradients.metrics})
        skipped = len(updates) + 1 - len(rows)
        return UpdateResult(combine(rows), skipped, tuple(sorted(broken)), masked)

    def _references(self, batches: Sequence[MicroBatch]) -> Sequence[ReferenceOutputs | None]:
        if self.trainer.reference is None:
            return [None] * len(batches)
        with self.phases("reference"):
            return self.trainer.reference.keep(batches)


def finite(rollout: Rollout, topk: int) -> bool:
    """Whether the engine's log-probs of all tokens that carry loss, and of their first `topk` entries, are
    finite."""
    carries_loss = rollout.mask > 0
    if not np.isfinite(rollout.logp[carries_loss]).all():
        return False
    if topk == 0 or rollout.topk is None:
        return True
    ids, logp = rollout.topk.ids[carries_loss, :topk], rollout.topk.logp[carries_loss, :topk]
    return bool(np.isfinite(logp[ids != NO_ID]).all())


def split[T](parts: Sequence[T], updates: Sequence[Sequence[MicroBatch]]) -> list[Sequence[T]]:
    """Group `parts`, one per micro-batch, by update; empty ones if there are none (not the last stage)."""
    starts = np.cumsum([0, *(len(update) for update in updates)])
    return [parts[start : start + len(update)] for start, update in zip(starts, updates)]


def combine(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Combine the rows of several updates into one: the largest of */max, the smallest of */min, else the
    mean over the rows that have the name."""
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
