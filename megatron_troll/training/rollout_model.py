"""The model that samples rollouts in the policy's place, and its training towards the policy (Jackpot, arXiv
2602.06107)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_troll.advantages import Advantage
from megatron_troll.batching.build import Advantages
from megatron_troll.batching.held import HeldBatches, joined
from megatron_troll.config import Config, Distill
from megatron_troll.config import RolloutModelConfig as RolloutModelConfig
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.schedule import infer
from megatron_troll.mcore.shape import read_shape
from megatron_troll.objectives.correction.none import NoCorrection
from megatron_troll.objectives.distill import Distillation
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.ratio.token import Token
from megatron_troll.objectives.trust_region.clip import Clip
from megatron_troll.observe.phases import Phases
from megatron_troll.task import Task
from megatron_troll.training.build import open_policy
from megatron_troll.training.learner import combine, finite, split
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.regroup import regrouped
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import HeadOutputs, HeadRequest, MicroBatch, Rollout, TopK

# Metrics reported of its updates, by their names in objectives.
REPORTED = ("clipped", "approx_kl", "entropy")


@dataclass(frozen=True)
class DistillResult:
    """Metrics of a batch, and the distillation weight for the next one."""

    metrics: dict[str, float]
    weight: float


@dataclass(frozen=True)
class RolloutModel:
    """The rollout model. Its loss is PPO's on its own samples, with old log-probs from the engine, plus the
    distillation, over the same steps and token weights as the policy's. The policy is read once, after its
    updates on the batch: the rollout model moves towards the policy that its next rollouts will train. The
    policy's records, 12 bytes x (k + 2) per loss token, stay on the last stage until the batch is done. Both
    models are sharded in the same way, so that they have the same micro-batches."""

    trainer: PolicyTrainer
    teacher: Head
    batcher: MicroBatcher
    distill: Distill
    phases: Phases

    @property
    def model(self) -> MegatronModel:
        return self.trainer.trainable.model

    def learn(
        self, rollouts: Sequence[Rollout], advantages: Advantages, step: int, weight: float | None
    ) -> DistillResult:
        """Take one optimizer step for each of the policy's. `weight` of the distillation; None: the
        configured one. A step with NaN or Inf is skipped and counted, one without a token that carries loss
        is not taken. Blocks on all ranks."""
        weight = self.distill.weight if weight is None else weight
        if not all(finite(rollout, 0) for rollout in rollouts):
            return DistillResult({"rollout_model_skipped": float(self.batcher.config.train.updates)}, weight)
        with self.phases("rollout_model"):
            planned = self.batcher.updates(rollouts, advantages, step)
            updates = [update for update in planned if update]
            learner = with_weight(self.trainer, weight)
            records = self._records(planned) if updates else []
            rows = [_step(learner, *parts) for parts in zip(updates, split(records, updates))]
        taken = [row for row in rows if row]
        metrics = combine(taken) | {
            "rollout_model_skipped": float(len(rows) - len(taken)),
            "rollout_model_lr": self.trainer.trainable.lr,
            "distill_weight": weight,
        }
        return DistillResult(metrics, moved(self.distill, weight, metrics.get("distill_kl", math.nan)))

    def _records(self, planned: Sequence[HeldBatches]) -> list[TopK]:
        """The policy's records, one per micro-batch, on the last stage. It reads those of the first epoch."""
        train = self.batcher.config.train
        epoch = train.updates // train.epochs
        batches, later = joined(planned[:epoch]), joined(planned[epoch:])
        reads = HeadRequest(topk=_distillation(self.trainer).record)

        def read(i: int, hidden: Tensor) -> TopK:
            record = self.teacher.read(hidden, batches[i].target, reads).topk
            assert record is not None
            return record

        records = infer(self.teacher.model, batches, read)
        again = records and later
        return records + (regrouped(batches, records, later, self.model.groups.dp_cp) if again else [])


def _step(learner: PolicyTrainer, batches: Sequence[MicroBatch], records: Sequence[TopK]) -> dict[str, float]:
    """Take one optimizer step and return its metrics; {} if it was skipped."""
    old = [HeadOutputs(batch.rollout_logp, record, None) for batch, record in zip(batches, records)]
    gradients = learner.accumulate(batches, old, [None] * len(batches))
    grad_norm = learner.trainable.step_if_finite(gradients.loss)
    if grad_norm is None:
        return {}
    reported = {
        f"rollout_model_{name}": gradients.metrics[name] for name in REPORTED if name in gradients.metrics
    }
    distilled = {name: value for name, value in gradients.metrics.items() if name.startswith("distill_")}
    return {
        "rollout_model_loss": gradients.loss,
        "rollout_model_grad_norm": grad_norm,
        **reported,
        **distilled,
    }


def with_weight(trainer: PolicyTrainer, weight: float) -> PolicyTrainer:
    """The same trainer with `weight` on its distillation."""
    objective = trainer.objective
    assert isinstance(objective, Objective)
    distillation = _distillation(trainer).model_copy(update={"coef": weight})
    return replace(trainer, objective=replace(objective, kl=distillation))


def _distillation(trainer: PolicyTrainer) -> Distillation:
    assert isinstance(trainer.objective, Objective)
    assert isinstance(trainer.objective.kl, Distillation)
    return trainer.objective.kl


def moved(distill: Distill, weight: float, kl: float) -> float:
    """The distillation weight after a batch with mean `kl` over its tokens: an integral controller of its
    logarithm with a bounded step. Unchanged if there is no target, the weight is 0, or `kl` is not finite and
    above 0."""
    if distill.target_kl is None or weight == 0 or not (math.isfinite(kl) and kl > 0):
        return weight
    error = max(-1.0, min(1.0, math.log(kl / distill.target_kl)))
    low, high = distill.limits
    return max(low, min(high, weight * math.exp(distill.gain * error)))


def open_rollout_model(task: Task, policy: MegatronModel, phases: Phases) -> RolloutModel:
    """The rollout model with its optimizer. It shares the process groups of `policy`, or makes its own if its
    experts are sharded differently. Blocks on every rank."""
    config, model = task.config, task.config.models.rollout
    assert model is not None
    groups = policy.groups if model.layout == config.policy.layout else parallel.also(model.layout)
    updates = config.train.steps * config.train.updates
    trained = open_policy(model, read_shape(model.path), groups, config.seed, updates, policy.progress)
    return assembled(config, model, trained, policy, task.objective.advantage, phases)


def assembled(
    config: Config,
    model: RolloutModelConfig,
    trained: Trainable,
    policy: MegatronModel,
    advantage: Advantage,
    phases: Phases,
) -> RolloutModel:
    """Assemble the rollout model from its built model `trained` and its teacher `policy`."""
    temperature, chunk = config.rollout.sampling.temperature, config.train.head_chunk
    objective = Objective(
        advantage=advantage,
        ratio=Token(),
        trust_region=Clip(),
        kl=Distillation(coef=model.distill.weight, k=model.distill.k),
        correction=NoCorrection(),
    )
    head = Head(trained.model, temperature, chunk)
    trainer = PolicyTrainer(trained, objective, head, "engine", None, config.objective.aggregation)
    batcher = MicroBatcher(config, trained.model, model.layout)
    return RolloutModel(trainer, Head(policy, temperature, chunk), batcher, model.distill, phases)
