"""One policy under one objective: old records, batch statistics, gradients, optimizer steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_troll.batching.build import Advantages
from megatron_troll.mcore.head import Head, HeadContext
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.router import expert_loads, recording, replay_tallies, routers
from megatron_troll.mcore.schedule import accumulate, infer, step_loss, survey
from megatron_troll.objectives.mismatch import effective_sample_size
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Diagnostics, Statistics
from megatron_troll.objectives.supervised import Supervised
from megatron_troll.observe.experts import expert_metrics, replay_metrics
from megatron_troll.observe.metrics import Reducer
from megatron_troll.observe.phases import Phases
from megatron_troll.parallel.segments import segments
from megatron_troll.parallel.vocab import gather_logits, kl
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import Reference, ReferenceOutputs
from megatron_troll.types import NO_ID, HeadOutputs, LossTerms, MicroBatch, ObjectiveInputs, Rollout

PROBED_POSITIONS = 16
PROBED: Diagnostics = {"true_kl": ("mean",), "sparse_kl": ("mean",), "outside_mass": ("mean", "max")}
MISMATCH: Diagnostics = {"rollout_trainer_kl": ("mean", "max"), "rollout_trainer_gap": ("max",)}


class Unhealthy(RuntimeError):
    """Updates produce NaN or Inf."""


@dataclass(frozen=True)
class Gradients:
    """Result of one accumulation on this rank: the step's loss summed over all ranks, reduced diagnostics,
    and the indices of rollouts with a non-finite objective (last stage only)."""

    loss: float
    metrics: dict[str, float]
    broken: tuple[int, ...]


@dataclass(frozen=True)
class OldPolicyOutputs:
    """readings: one per micro-batch on the last stage, [] elsewhere. broken: rollouts, on any rank, with a
    log-prob that is NaN or infinite; their readings cannot be trained on. batches: the micro-batches to train
    on, with the experts of this pass if it recorded them."""

    readings: list[HeadOutputs]
    broken: tuple[int, ...]
    batches: list[MicroBatch]


@dataclass(frozen=True)
class PolicyTrainer:
    """Trains one policy under one objective.

    `old: trainer` reads the policy at the start of the update in a separate forward pass; `old: engine` uses
    the rollout engine's record. Old readings stay on the last stage's device until the batch is done: 12
    bytes x (K + 1) per loss token and record, on every tensor-parallel rank. The readings of a `reference`
    stay there too, with the hidden state of each token if logits are computed from it again. `aggregation`:
    how the weights of the micro-batches average tokens. `replay: old` repeats the experts of the old policy's
    forward in all later ones, which keeps layers x k numbers per token of this rank; `replay: rollout`
    repeats the experts that the micro-batches hold."""

    trainable: Trainable
    objective: Objective | Supervised
    head: Head
    old: Literal["trainer", "engine"] = "trainer"
    reference: Reference | None = None
    aggregation: str | None = None
    replay: Literal["none", "old", "rollout"] = "none"

    def old_readings(self, batches: Sequence[MicroBatch]) -> OldPolicyOutputs:
        """Read the policy before its update, once per micro-batch. Blocks on every rank."""
        broken: list[int] = []
        checked = self.objective.prepare_old if self.old == "engine" else self.objective.check_old

        def prepared(i: int, readings: HeadOutputs) -> HeadOutputs:
            assert readings.logp is not None
            finite = torch.isfinite(readings.logp)
            if bool(finite.all()):
                return checked(readings)
            broken.extend(rollouts_of(batches[i], ~finite))
            return readings

        if self.replay == "old":
            with recording(self.trainable.model.chunks) as chosen:
                readings = self._read_old(batches, prepared)
            batches = with_experts(batches, chosen)
        else:
            readings = self._read_old(batches, prepared)
        return OldPolicyOutputs(readings, self.agree_on(broken), list(batches))

    def _read_old(
        self, batches: Sequence[MicroBatch], prepared: Callable[[int, HeadOutputs], HeadOutputs]
    ) -> list[HeadOutputs]:
        if self.old == "engine":
            records = [engine_readings(batch) for batch in batches]
            return [prepared(i, record) for i, record in enumerate(records)] if self._last else []
        reads = replace(self.objective.reads_old, logp=True)

        def read(i: int, hidden: Tensor) -> HeadOutputs:
            readings = self.head.read(
                hidden, batches[i].target, reads, HeadContext(rollout=batches[i].rollout_topk)
            )
            probe = self.head.probe(hidden, probed_rows(len(hidden)).to(hidden.device))
            return prepared(i, replace(readings, probe=probe))

        return infer(self.trainable.model, batches, read)

    def agree_on(self, rollouts: Sequence[int]) -> tuple[int, ...]:
        """The union of `rollouts` over all ranks, ascending. Blocks."""
        named = self.trainable.model.groups.world.all_gather_objects(sorted(rollouts))
        return tuple(sorted({i for part in named for i in part}))

    def mismatch(self, batches: Sequence[MicroBatch], old: Sequence[HeadOutputs]) -> dict[str, float]:
        """Metrics of the engine's log-probs against the old policy's, over all loss tokens. Blocks."""
        reducer = self._reducer(MISMATCH)
        for batch, readings in zip(batches, old):
            assert readings.logp is not None
            gap = readings.logp - batch.rollout_logp
            reducer.add({"rollout_trainer_kl": gap.expm1() - gap, "rollout_trainer_gap": gap.abs()})
        return self._from_last_stage(reducer)

    def accumulate(
        self,
        batches: Sequence[MicroBatch],
        old: Sequence[HeadOutputs],
        kept: Sequence[ReferenceOutputs | None],
    ) -> Gradients:
        """Compute the gradients of one optimizer step, in `main_grad`, from zero. `kept`: the reference's
        outputs; without a reference, None for each micro-batch. Blocks on every rank."""
        statistics = self._statistics(batches, old, kept)
        reducer = self._reducer({**self.objective.diagnostics, **PROBED, "entropy": ("mean",)})
        losses: list[Tensor] = []
        objectives: list[Tensor] = []

        def loss(i: int, hidden: Tensor) -> tuple[Tensor, None]:
            inputs = self._inputs(batches[i], hidden, old[i], kept[i])
            terms = self.objective.loss(inputs, statistics)
            # If the new policy's full rows are not computed, only the old policy's entropy may be known.
            entropy = inputs.old.entropy if inputs.new.entropy is None else inputs.new.entropy
            extra = {} if entropy is None else {"entropy": entropy}
            reducer.add({**terms.per_token, **extra, **self._probed(hidden, inputs, terms)})
            losses.append(terms.loss.detach())
            objectives.append(terms.per_token["objective"])
            return terms.loss, None

        model = self.trainable.model
        accumulate(model, batches, loss)
        loads = expert_loads(model.chunks, model.groups.pp) if model.shape.experts else {}
        total = step_loss(model, losses)
        broken = {
            i
            for batch, values in zip(batches, objectives)
            for i in rollouts_of(batch, ~torch.isfinite(values))
        }
        metrics = self._from_last_stage(reducer) | expert_metrics(loads)
        metrics |= effective_sample_size(metrics)
        if self.replay != "none":
            metrics |= replay_metrics(
                replay_tallies(model.chunks, model.groups.pp), loads, model.shape.experts_per_token
            )
        return Gradients(total, metrics, tuple(sorted(broken)))

    def _probed(self, hidden: Tensor, inputs: ObjectiveInputs, terms: LossTerms) -> dict[str, Tensor]:
        """Diagnostics from full rows at the probed positions [M]: the true KL(new || old), the sparse one,
        and the mass that has left the old support since it was recorded (ALGORITHMS 1.8)."""
        probe, old = inputs.old.probe, inputs.old.topk
        if probe is None:
            return {}
        tp, rows = self.trainable.model.groups.tp, probe.rows
        new = self.head.probe(hidden.detach(), rows)
        probed = {"true_kl": kl(new.logp, probe.logp, tp)}
        if "kl_before" in terms.per_token:
            probed["sparse_kl"] = terms.per_token["kl_before"][rows]
        if old is not None:
            before, after = (gather_logits(p.logp, old.ids[rows], tp).exp().sum(1) for p in (probe, new))
            probed["outside_mass"] = before - after
        return probed

    def _statistics(
        self,
        batches: Sequence[MicroBatch],
        old: Sequence[HeadOutputs],
        kept: Sequence[ReferenceOutputs | None],
    ) -> Statistics | None:
        """Run a forward pass of the whole step without gradient, if the objective or the balancing loss needs
        sums over all of it. Returns the objective's, on the last stage. Blocks."""
        model = self.trainable.model
        balancing = any(router.coefficient for router in routers(model.chunks))
        if not (balancing or self.objective.needs_statistics):
            return None

        def read(i: int, hidden: Tensor) -> Statistics | None:
            if not self.objective.needs_statistics:
                return None
            return self.objective.statistics(self._inputs(batches[i], hidden, old[i], kept[i]))

        parts = survey(model, batches, read)
        if not self.objective.needs_statistics or not self._last:
            return None
        totals = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        return {name: model.groups.dp_cp.all_reduce(total) for name, total in totals.items()}

    def _inputs(
        self, batch: MicroBatch, hidden: Tensor, old: HeadOutputs, kept: ReferenceOutputs | None
    ) -> ObjectiveInputs:
        reads, frozen = self.objective.reads, None if kept is None else kept.frozen
        new = self.head.read(hidden, batch.target, reads, HeadContext(old, batch.rollout_topk, frozen))
        reference = None
        if kept is not None:
            assert self.reference is not None
            reference = self.reference.beside(kept, new, reads)
        return ObjectiveInputs(
            new=new,
            old=old,
            rollout_logp=batch.rollout_logp,
            rollout_topk=batch.rollout_topk,
            advantage=batch.advantage,
            weight=batch.weight,
            position=batch.position,
            segments=segments(
                batch.sequence, batch.position, len(batch.rollouts), self.trainable.model.groups.cp
            ),
            group=torch.tensor(batch.groups, dtype=torch.int64, device=hidden.device),
            rollout=torch.tensor(batch.rollouts, dtype=torch.int64, device=hidden.device),
            rollouts=batch.batch_size,
            uniform=batch.uniform,
            reference=reference,
            aggregation=self.aggregation,
            response_advantage=batch.response_advantage,
            frequency=batch.frequency,
        )

    @property
    def _last(self) -> bool:
        return self.trainable.model.groups.is_last_stage

    def _reducer(self, table: Diagnostics) -> Reducer:
        return Reducer(table, self.trainable.model.groups.dp_cp, device())

    def _from_last_stage(self, reducer: Reducer) -> dict[str, float]:
        pp = self.trainable.model.groups.pp
        return pp.broadcast_object(reducer.result() if self._last else None, pp.size - 1)


def engine_readings(batch: MicroBatch) -> HeadOutputs:
    """The rollout engine's record, used as readings of the old policy."""
    topk = batch.rollout_topk
    return HeadOutputs(batch.rollout_logp, topk, None, at_rollout=None if topk is None else topk.logits)


def with_experts(batches: Sequence[MicroBatch], chosen: Mapping[int, Sequence[Tensor]]) -> list[MicroBatch]:
    """The micro-batches with the experts that the routers chose in one forward pass of each."""
    return [
        replace(batch, experts={layer: of_batch[i] for layer, of_batch in chosen.items()})
        for i, batch in enumerate(batches)
    ]


def probed_rows(n: int) -> Tensor:
    """Indices of at most PROBED_POSITIONS of n positions, evenly spread."""
    return torch.arange(0, n, max(1, -(-n // PROBED_POSITIONS)))


def rollouts_of(batch: MicroBatch, marked: Tensor) -> list[int]:
    """The rollouts to which the marked [N] tokens of a micro-batch belong. Waits for the device."""
    return [batch.rollouts[i] for i in batch.sequence[marked].unique().tolist()]


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
        unusable = tuple(i for i, rollout in enumerate(rollouts) if not finite(rollout, self.batcher.topk))
        if unusable:
            return UpdateResult({}, self.batcher.config.train.updates, unusable)
        planned = self.batcher.updates(rollouts, advantages, step)
        updates = [update for update in planned if update]
        masked = len(planned) - len(updates)
        if not updates:
            return UpdateResult({}, 0, (), masked)
        every = [batch for update in updates for batch in update]
        with self.phases("old_policy"):
            old = self.trainer.old_readings(every)
        if old.broken:
            return UpdateResult({}, len(updates), old.broken, masked)
        kept = self._references(every)
        rows = [self.trainer.mismatch(every, old.readings)]
        broken: set[int] = set()
        parts = (split(each, updates) for each in (old.batches, old.readings, kept))
        for update, readings, references in zip(*parts):
            with self.phases("forward_backward"):
                gradients = self.trainer.accumulate(update, readings, references)
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


def split[T](parts: Sequence[T], updates: Sequence[Sequence[MicroBatch]]) -> list[list[T]]:
    """Group `parts`, one per micro-batch, by update; empty lists if there are none (not the last stage)."""
    starts = np.cumsum([0, *(len(update) for update in updates)])
    return [list(parts[start : start + len(update)]) for start, update in zip(starts, updates)]


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
