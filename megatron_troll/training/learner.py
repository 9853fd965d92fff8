"""The optimizer steps of one rollout batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_troll.batching.build import Advantages
from megatron_troll.batching.held import HeldBatches, joined
from megatron_troll.observe.phases import Phases
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import ReferenceOutputs
from megatron_troll.training.regroup import regrouped
from megatron_troll.training.trainer import OldPolicyOutputs, PolicyTrainer
from megatron_troll.types import NO_ID, HeadOutputs, MicroBatch, Rollout


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
class _Before:
    """Readings from before the first of several updates, one per micro-batch on the last stage, [] elsewhere.

    steps       the micro-batches of each update
    old         the old policy's readings of each update; None: not read yet, or read in the first epoch
    kept        the reference's of each update of the first epoch; [] of later ones
    whole       the micro-batches of the first epoch
    read        all readings of the old policy
    references  the reference's readings of `whole`; None without a reference
    broken      rollouts whose readings cannot be trained on
    """

    steps: list[Sequence[MicroBatch]]
    old: list[Sequence[HeadOutputs] | None]
    kept: list[Sequence[ReferenceOutputs | None]]
    whole: Sequence[MicroBatch]
    read: list[HeadOutputs]
    references: Sequence[ReferenceOutputs | None]
    broken: tuple[int, ...]


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
        planned, train = self.batcher.updates(rollouts, advantages, step), self.batcher.config.train
        updates = [update for update in planned if update]
        masked = len(planned) - len(updates)
        if not updates:
            return UpdateResult({}, 0, (), masked)
        epoch = sum(map(bool, planned[: train.updates // train.epochs]))
        before = self._read(updates, epoch)
        if before.broken:
            return UpdateResult({}, len(updates), before.broken, masked)
        rows, found = [self.trainer.spared(joined(updates))], before.read
        broken: set[int] = set()
        for number, update in enumerate(before.steps):
            old, kept = before.old[number], before.kept[number]
            if number >= epoch:
                with self.phases("old_policy"):
                    old = self._again(before.whole, found, update) if old is None else old
                    kept = self._again(before.whole, before.references, update)
            with self.phases("forward_backward"):
                gradients = self.trainer.accumulate(update, old, kept)
            if number == 0:
                made = gradients.old if old is None else []
                unusable = self.trainer.unusable(update, made)
                if unusable:
                    return UpdateResult({}, len(updates), unusable, masked)
                found = [*made, *before.read][: len(before.whole)]
                rows[0] |= self.trainer.mismatch(before.whole, found)
            with self.phases("optimizer"):
                grad_norm = self.trainer.trainable.step_if_finite(gradients.loss)
                if grad_norm is None:
                    broken |= set(self.trainer.agree_on(gradients.broken))
                    continue
            rows.append({"loss": gradients.loss, "grad_norm": grad_norm, **gradients.metrics})
        skipped = len(updates) + 1 - len(rows)
        return UpdateResult(combine(rows), skipped, tuple(sorted(broken)), masked)

    def _read(self, updates: Sequence[HeldBatches], epoch: int) -> "_Before":
        """Read what `updates` are made beside; the first `epoch` of them hold every rollout once. Blocks."""
        # The first update's forward reads the old policy too: no step has moved the weights before it.
        # Experts to replay must be recorded in the order of each epoch.
        first = 1 if self.trainer.old == "trainer" else 0
        end = len(updates) if first == 0 or self.trainer.replay == "old" else epoch
        whole, later, rest = joined(updates[:epoch]), joined(updates[first:end]), len(updates) - end
        with self.phases("old_policy"):
            old = self.trainer.old_readings(later) if later else OldPolicyOutputs([], (), [])
        references = [] if old.broken else self._references(whole)
        return _Before(
            steps=[*updates[:first], *split(old.batches, updates[first:end]), *updates[end:]],
            old=[*[None] * first, *split(old.readings, updates[first:end]), *[None] * rest],
            kept=split(references, updates),
            whole=whole,
            read=old.readings,
            references=references,
            broken=old.broken,
        )

    def _again(
        self, batches: Sequence[MicroBatch], readings: Sequence[Any], update: Sequence[MicroBatch]
    ) -> list[Any]:
        """The readings of `batches`, which may be None, for the tokens of a later update; [] if there are
        none (not the last stage). Blocks."""
        if not readings or readings[0] is None:
            return [None] * len(update) if readings else []
        return regrouped(batches, readings, update, self.trainer.trainable.model.groups.dp_cp)

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
