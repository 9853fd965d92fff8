"""PPO's critic: its values of every token, and its training towards their targets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_troll.advantages import Advantage, Values
from megatron_troll.batching.build import Advantages
from megatron_troll.config import Config
from megatron_troll.mcore import parallel
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.router import routers
from megatron_troll.mcore.schedule import accumulate, infer, step_loss, survey
from megatron_troll.mcore.shape import read_shape
from megatron_troll.mcore.value import ValueModel, values
from megatron_troll.observe.phases import Phases
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.types import MicroBatch, Rollout
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource, open_checked
from megatron_troll.weights.value import ValueSource, value_table


@dataclass(frozen=True)
class Critic:
    """The value model, with a layout of its own, on the same ranks as the policy.

    loss = sum_t w_t (V_t - R_t)^2 / 2 with the token weights of the policy's loss, over the same steps. The
    values are not clipped to the old ones: clipping was found not to help (arXiv 2006.05990, 3.2).
    """

    trained: Trainable
    batcher: MicroBatcher
    phases: Phases

    def values(self, rollouts: Sequence[Rollout], step: int) -> Values:
        """V of every token that carries loss, before the update. Every rank receives all of them, one number
        per token of the batch. Blocks on all ranks."""
        model = self.trained.model
        batches = self.batcher.once(rollouts, step)

        def read(i: int, hidden: Tensor) -> np.ndarray:
            return values(model, hidden).cpu().numpy()

        with self.phases("critic"):
            found = infer(model, batches, read) if batches else []
        lengths = [int(rollout.mask.sum()) for rollout in rollouts]
        starts = np.cumsum([0, *lengths])
        whole = np.zeros(starts[-1], dtype=np.float32)
        # All tensor-parallel ranks have the same values: one fills them in. The others' are 0 in the sum.
        for batch, each in zip(batches, found) if model.groups.tp.rank == 0 else ():
            for owner, position, value in placed(batch, each):
                whole[starts[owner] + position] = value
        model.groups.world.sum_arrays(whole)
        return Values(torch.from_numpy(whole), torch.tensor(lengths, dtype=torch.int64))

    def learn(
        self, rollouts: Sequence[Rollout], targets: Sequence[np.ndarray], step: int
    ) -> dict[str, float]:
        """Take one critic step for each optimizer step of the policy, towards `targets` [T] of each rollout.
        Returns metrics; a step with NaN or Inf is skipped and counted, one without a token that carries loss
        is not taken. Blocks on all ranks."""
        with self.phases("critic"):
            updates = self.batcher.updates(rollouts, targets, step)
            rows = [self._step(update) for update in updates if update]
        taken = [row for row in rows if row]
        metrics = {name: float(np.mean([row[name] for row in taken])) for row in taken[:1] for name in row}
        return metrics | {"critic_skipped": float(len(rows) - len(taken))}

    def _step(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        model = self.trained.model
        if any(router.coefficient for router in routers(model.chunks)):
            survey(model, batches, lambda i, hidden: None)

        def loss(i: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            # A critic's batches carry its targets in the field of the advantages.
            error = values(model, hidden) - batches[i].advantage
            value = (batches[i].weight * error.square()).sum() / 2
            return value, value.detach()

        parts = accumulate(model, batches, loss)
        total = step_loss(model, parts)
        grad_norm = self.trained.step_if_finite(total)
        return {} if grad_norm is None else {"critic_loss": total, "critic_grad_norm": grad_norm}


def placed(batch: MicroBatch, values: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(rollout, positions, values) of each response in a micro-batch."""
    sequence, position = batch.sequence.cpu().numpy(), batch.position.cpu().numpy()
    return [
        (rollout, position[sequence == i], values[sequence == i]) for i, rollout in enumerate(batch.rollouts)
    ]


def open_critic(config: Config, policy: MegatronModel, phases: Phases) -> Critic:
    """The critic with its optimizer: the body of models.critic under a value head of zeros. It shares the
    process groups of `policy`, or makes its own if its layout differs. Blocks on every rank."""
    model = config.models.critic
    assert model is not None
    groups = policy.groups if model.layout == config.policy.layout else parallel.also(model.layout)
    # There is no LM head, and so no tied embedding.
    of_folder = read_shape(model.path)
    shape = replace(of_folder, tied=False)
    random = model.init == "random"
    body = RandomSource(shape, config.seed) if random else open_checked(model.path, of_folder, groups.world)
    built = build(model, shape, groups, kind=ValueModel, progress=policy.progress)
    load(built, ValueSource(body, shape.hidden), value_table(table_of(shape), shape.hidden))
    updates = config.train.steps * config.train.updates
    trained = trainable(built, model.optimizer, updates)
    return Critic(trained, MicroBatcher(config, built, model.layout), phases)


@dataclass(frozen=True)
class AdvantageEstimate:
    """advantages: one per response, or one per token with a critic. targets [T] of each response: values that
    the critic should have predicted; empty without a critic. metrics: how well it predicted them."""

    advantages: Advantages
    targets: list[np.ndarray]
    metrics: dict[str, float]

    @property
    def means(self) -> list[float]:
        """One number per response."""
        return [float(np.mean(advantage)) for advantage in self.advantages]


def estimate(
    method: Advantage, critic: Critic | None, rollouts: Sequence[Rollout], rewards: np.ndarray, step: int
) -> AdvantageEstimate:
    """Estimate advantages. A critic, if given, computes every token's value and blocks on all ranks."""
    reward, group = torch.from_numpy(rewards), torch.tensor([rollout.group for rollout in rollouts])
    if critic is None:
        return AdvantageEstimate(method(reward, group).tolist(), [], {})
    values = critic.values(rollouts, step)
    lengths = values.length.tolist()
    advantages = method(reward, group, values).split(lengths)
    wanted = method.targets(reward, values)
    targets = wanted.float().split(lengths)
    return AdvantageEstimate(
        [spread(part.numpy(), rollout) for part, rollout in zip(advantages, rollouts)],
        [spread(part.numpy(), rollout) for part, rollout in zip(targets, rollouts)],
        {"critic_explained_variance": explained_variance(values.value, wanted)},
    )


def explained_variance(values: torch.Tensor, targets: torch.Tensor) -> float:
    """1 - var(targets - values) / var(targets) over all tokens [L]: 1 for a perfect critic, 0 for a
    constant one, negative for a worse one. NaN or -inf if all targets are equal."""
    if len(targets) == 0:
        return float("nan")
    spread = targets.double().var(correction=0)
    return float(1.0 - (targets - values).double().var(correction=0) / spread)


def spread(values: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Values of the tokens that carry loss, at their places among all tokens of the response [T]; 0 at the
    other tokens."""
    whole = np.zeros(len(rollout.response_ids), dtype=np.float32)
    whole[rollout.mask > 0] = values
    return whole
