"""From a scored rollout batch to optimizer steps of the policy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.arrange import Arranger
from megatron_troll.batching.build import Advantages
from megatron_troll.observe.phases import Phases
from megatron_troll.reference import Kept
from megatron_troll.trainer import PolicyTrainer
from megatron_troll.types import NO_ID, MicroBatch, Rollout


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
    arranger: Arranger
    phases: Phases

    def learn(self, rollouts: Sequence[Rollout], advantages: Advantages, step: int) -> Learned:
        """Train on `rollouts` (the whole batch, on every rank). `step` seeds the plan. Blocks on every
        rank."""
        unusable = tuple(i for i, rollout in enumerate(rollouts) if not finite(rollout, self.arranger.topk))
        if unusable:
            return Learned({}, self.arranger.config.train.updates, unusable)
        updates = self.arranger.updates(rollouts, advantages, step)
        every = [batch for update in updates for batch in update]
        with self.phases("old_policy"):
            old = self.trainer.old_readings(every)
        if old.broken:
            return Learned({}, len(updates), old.broken)
        kept = self._references(every)
        rows = [self.trainer.mismatch(every, old.readings)]
        broken: set[int] = set()
        parts = (split(each, updates) for each in (old.batches, old.readings, kept))
        for update, readings, references in zip(*parts):
            with self.phases("forward_backward"):
                gradients = self.trainer.accumulate(update, readings, references)
            with self.phases("optimizer"):
                if not self.trainer.healthy(gradients):
                    broken |= set(self.trainer.agree_on(gradients.broken))
                    continue
                grad_norm = self.trainer.trainable.step()
            rows.append({"loss": gradients.loss, "grad_norm": grad_norm, **gradients.metrics})
        skipped = len(updates) + 1 - len(rows)
        return Learned(combine(rows), skipped, tuple(sorted(broken)))

    def _references(self, batches: Sequence[MicroBatch]) -> Sequence[Kept | None]:
        if self.trainer.reference is None:
            return [None] * len(batches)
        with self.phases("reference"):
            return self.trainer.reference.keep(batches)


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


def split[T](parts: Sequence[T], updates: Sequence[Sequence[MicroBatch]]) -> list[list[T]]:
    """One part per micro-batch, by update; empty lists where there is none (off the last stage)."""
    starts = np.cumsum([0, *(len(update) for update in updates)])
    return [list(parts[start : start + len(update)]) for start, update in zip(starts, updates)]


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
