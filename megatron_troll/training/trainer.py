"""One policy under one objective: old records, batch statistics, gradients, optimizer steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_troll.batching.held import with_experts
from megatron_troll.mcore.head import Head, HeadContext, Scan
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.router import expert_loads, recording, replay_tallies, routers
from megatron_troll.mcore.schedule import accumulate, infer, step_loss, survey
from megatron_troll.objectives.asymmetry import asymmetry, totals_of
from megatron_troll.objectives.mismatch import effective_sample_size
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Diagnostics, Statistics
from megatron_troll.objectives.supervised import Supervised
from megatron_troll.observe.experts import expert_metrics, replay_metrics
from megatron_troll.observe.metrics import Reducer
from megatron_troll.parallel.segments import segments
from megatron_troll.parallel.vocab import gather_logits, kl
from megatron_troll.training.reference import Reference, ReferenceOutputs
from megatron_troll.types import (
    SHARES,
    HeadOutputs,
    HeadRequest,
    LossTerms,
    MicroBatch,
    ObjectiveInputs,
)

PROBED_POSITIONS = 16
PROBED: Diagnostics = {"true_kl": ("mean",), "sparse_kl": ("mean",), "outside_mass": ("mean", "max")}
MISMATCH: Diagnostics = {"rollout_trainer_kl": ("mean", "max"), "rollout_trainer_gap": ("max",)}


class Unhealthy(RuntimeError):
    """Updates produce NaN or Inf."""


@dataclass(frozen=True)
class Gradients:
    """Result of one accumulation on this rank: the step's loss summed over all ranks, reduced diagnostics,
    the indices of rollouts with a non-finite objective (last stage only), and the old policy's readings
    beside which it was made, one per micro-batch on the last stage."""

    loss: float
    metrics: dict[str, float]
    broken: tuple[int, ...]
    old: list[HeadOutputs]


@dataclass(frozen=True)
class OldPolicyOutputs:
    """readings: one per micro-batch on the last stage, [] elsewhere. broken: rollouts, on any rank, with a
    log-prob that is NaN or infinite; their readings cannot be trained on. batches: the micro-batches to train
    on, with the experts of this pass if it recorded them."""

    readings: list[HeadOutputs]
    broken: tuple[int, ...]
    batches: Sequence[MicroBatch]


@dataclass(frozen=True)
class PolicyTrainer:
    """Trains one policy under one objective.

    `old: trainer` reads the policy at the start of the update, in a forward pass of its own where later steps
    move the weights (`accumulate` reads it with the step's own forward where they are equal); `old: engine`
    uses the rollout engine's record. Old readings stay on the last stage's device until the batch is done: 12
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
        if self.old == "engine":
            records = [engine_readings(batch) for batch in batches] if self._last else []
            readings = [self._checked(batch, record) for batch, record in zip(batches, records)]
            return OldPolicyOutputs(readings, self.unusable(batches, readings), batches)

        def read(i: int, hidden: Tensor) -> HeadOutputs:
            return self._old_of(batches[i], self.head.scan(hidden, batches[i].target, self._reads_old))

        with recording(self.trainable.model.chunks if self.replay == "old" else []) as chosen:
            readings = infer(self.trainable.model, batches, read)
        given = with_chosen(batches, chosen) if self.replay == "old" else batches
        return OldPolicyOutputs(readings, self.unusable(batches, readings), given)

    @property
    def _reads_old(self) -> HeadRequest:
        return replace(self.objective.reads_old, logp=True)

    @torch.no_grad()
    def _old_of(self, batch: MicroBatch, scan: Scan) -> HeadOutputs:
        """The old policy's readings, from hidden states of the weights at the start of the update."""
        context = HeadContext(rollout=batch.rollout_topk)
        readings = self.head.outputs(scan.detach(), self._reads_old, context)
        rows = probed_rows(len(scan.target)).to(scan.hidden.device)
        return self._checked(batch, replace(readings, probe=self.head.probe(scan.hidden.detach(), rows)))

    def _checked(self, batch: MicroBatch, readings: HeadOutputs) -> HeadOutputs:
        """The readings as the objective uses them; as they are if a log-prob is not finite."""
        if _not_finite(readings).any():
            return readings
        objective = self.objective
        return (objective.prepare_old if self.old == "engine" else objective.check_old)(readings)

    def unusable(self, batches: Sequence[MicroBatch], old: Sequence[HeadOutputs]) -> tuple[int, ...]:
        """The rollouts, on any rank, with a log-prob of the old policy that is NaN or infinite. Blocks."""
        return self.agree_on(
            {i for batch, readings in zip(batches, old) for i in rollouts_of(batch, _not_finite(readings))}
        )

    def agree_on(self, rollouts: Iterable[int]) -> tuple[int, ...]:
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

    def spared(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Metric of the tokens of shared prefixes that were read once instead of again, as a share of those
        that reading every response on its own repeats; {} if it repeats none. Blocks."""
        groups = self.trainable.model.groups
        once = torch.stack([batch.share.sum() for batch in batches]).sum().double() / SHARES
        mine = [(sum(batch.tree.length) if batch.tree else batch.apart, batch.apart) for batch in batches]
        # All context-parallel ranks of a micro-batch know its lengths, and each has a part of its tokens.
        read, apart = (sum(column) if groups.cp.rank == 0 else 0 for column in zip(*mine))
        total = torch.tensor([read, apart, 0.0], dtype=torch.float64, device=once.device)
        total[2] = once
        read, apart, once = groups.dp_cp.all_reduce(total).tolist()
        return {"spared_tokens": (apart - read) / (apart - once)} if apart - once >= 1.0 else {}

    def accumulate(
        self,
        batches: Sequence[MicroBatch],
        old: Sequence[HeadOutputs] | None,
        kept: Sequence[ReferenceOutputs | None],
    ) -> Gradients:
        """Compute the gradients of one optimizer step, in `main_grad`, from zero. `old`: the readings of the
        old policy; None: its weights are these, and this step's own forward reads it. `kept`: the reference's
        outputs; without a reference, None for each micro-batch. Blocks on every rank."""
        beside: list[HeadOutputs] = [] if old is None else [*old]
        # Of one micro-batch, the sums are known when its loss is computed.
        alone = len(batches) == 1 and not self._balancing
        statistics = None if alone else self._statistics(batches, beside, kept)
        read_already = bool(beside)
        reducer = self._reducer({**self.objective.diagnostics, **PROBED, "entropy": ("mean",)})
        losses, objectives, pulls = list[Tensor](), list[Tensor](), list[Tensor]()

        def loss(i: int, hidden: Tensor) -> tuple[Tensor, None]:
            inputs = self._inputs(batches[i], hidden, beside[i] if read_already else None, kept[i])
            if not read_already:
                assert i == len(beside)
                beside.append(inputs.old)
            sums = self._summed([self.objective.statistics(inputs)]) if alone else statistics
            terms = self.objective.loss(inputs, sums)
            # If the new policy's full rows are not computed, only the old policy's entropy may be known.
            entropy = inputs.old.entropy if inputs.new.entropy is None else inputs.new.entropy
            extra = {} if entropy is None else {"entropy": entropy}
            reducer.add({**terms.per_token, **extra, **self._probed(hidden, inputs, terms)})
            losses.append(terms.loss.detach())
            objectives.append(terms.per_token["objective"])
            pulls.append(totals_of(terms.pulls, inputs))
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
        metrics = self._from_last_stage(reducer, pulls) | expert_metrics(loads)
        metrics |= effective_sample_size(metrics)
        if self.replay != "none":
            metrics |= replay_metrics(
                replay_tallies(model.chunks, model.groups.pp), loads, model.shape.experts_per_token
            )
        return Gradients(total, metrics, tuple(sorted(broken)), beside)

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
        old: list[HeadOutputs],
        kept: Sequence[ReferenceOutputs | None],
    ) -> Statistics | None:
        """Run a forward pass of the whole step without gradient, if the objective or the balancing loss needs
        sums over all of it. Returns the objective's, on the last stage. If `old` is empty, this pass reads
        the old policy and fills it, on the last stage. Blocks."""
        if not (self._balancing or self.objective.needs_statistics):
            return None
        read_already = bool(old)

        def read(i: int, hidden: Tensor) -> Statistics | None:
            if not self.objective.needs_statistics and read_already:
                return None
            inputs = self._inputs(batches[i], hidden, old[i] if read_already else None, kept[i])
            if not read_already:
                old.append(inputs.old)
            return self.objective.statistics(inputs)

        return self._summed(survey(self.trainable.model, batches, read))

    @property
    def _balancing(self) -> bool:
        return any(router.coefficient for router in routers(self.trainable.model.chunks))

    def _summed(self, parts: Sequence[Statistics | None]) -> Statistics | None:
        """The sum of `parts`, one per micro-batch, over all ranks of the last stage; None on other stages and
        if the objective needs none. Blocks."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        totals = {name: torch.stack([part[name] for part in found]).sum(0) for name in found[0]}
        dp_cp = self.trainable.model.groups.dp_cp
        return {name: dp_cp.all_reduce(total) for name, total in totals.items()}

    def _inputs(
        self, batch: MicroBatch, hidden: Tensor, old: HeadOutputs | None, kept: ReferenceOutputs | None
    ) -> ObjectiveInputs:
        """Readings of the policy at `hidden`, beside `old`; None: the old policy's are read there too."""
        reads, frozen = self.objective.reads, None if kept is None else kept.frozen
        scan = self.head.scan(hidden, batch.target, reads, *([self._reads_old] if old is None else []))
        old = self._old_of(batch, scan) if old is None else old
        new = self.head.outputs(scan, reads, HeadContext(old, batch.rollout_topk, frozen))
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

    def _from_last_stage(self, reducer: Reducer, pulls: Sequence[Tensor] = ()) -> dict[str, float]:
        """The last stage's reduced diagnostics, and the asymmetry of `pulls`, the totals of each micro-batch
        (objectives/asymmetry.py)."""
        groups = self.trainable.model.groups
        found: dict[str, float] | None = None
        if self._last:
            found = reducer.result()
            # All ranks, or none: with a critic, a micro-batch without responses tells nothing of advantages.
            spread = asymmetry(groups.dp_cp.all_reduce(torch.stack([*pulls]).sum(0))) if pulls else None
            found |= {} if spread is None else {"asymmetry": spread}
        return groups.pp.broadcast_object(found, groups.pp.size - 1)


def engine_readings(batch: MicroBatch) -> HeadOutputs:
    """The rollout engine's record, used as readings of the old policy."""
    topk = batch.rollout_topk
    return HeadOutputs(batch.rollout_logp, topk, None, at_rollout=None if topk is None else topk.logits)


def _not_finite(readings: HeadOutputs) -> Tensor:
    """[N] bool."""
    assert readings.logp is not None
    return ~torch.isfinite(readings.logp)


def with_chosen(
    batches: Sequence[MicroBatch], chosen: Mapping[int, Sequence[Tensor]]
) -> Sequence[MicroBatch]:
    """The micro-batches with the experts that the routers chose in one forward pass of each."""
    return with_experts(
        batches,
        [{layer: of_batch[i] for layer, of_batch in chosen.items()} for i in range(len(batches))],
    )


def probed_rows(n: int) -> Tensor:
    """Indices of at most PROBED_POSITIONS of n positions, evenly spread."""
    return torch.arange(0, n, max(1, -(-n // PROBED_POSITIONS)))


def rollouts_of(batch: MicroBatch, marked: Tensor) -> list[int]:
    """The rollouts to which the marked [N] tokens of a micro-batch belong. Waits for the device."""
    return [batch.rollouts[i] for i in batch.sequence[marked].unique().tolist()]
