"""The training loop: prompts, rollouts, rewards, advantages, updates, and periodic evaluations."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from megatron_troll.advantages import zero_variance
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.rewards.pool import RewardError
from megatron_troll.rollout.engine import EngineError
from megatron_troll.run.collect import begin
from megatron_troll.run.evaluation import HELD_OUT
from megatron_troll.run.queue import BatchFuture, RolloutBatch, ages
from megatron_troll.run.run import Run, TrainState, open_run
from megatron_troll.system import Interrupts
from megatron_troll.task import Task
from megatron_troll.training.critic import AdvantageEstimate, estimate
from megatron_troll.training.learner import UpdateResult
from megatron_troll.training.microbatches import beyond_budget
from megatron_troll.training.throughput import speed
from megatron_troll.training.trainer import Unhealthy
from megatron_troll.types import Rollout

# Probability outside the old support above which KL on that support means little (ALGORITHMS 1.8).
OUTSIDE_MASS_ALARM = 1e-2
# Failures from outside that all ranks have, after which the policy is as good as before.
Rescued = EngineError | RewardError | OSError
RESCUED = (EngineError, RewardError, OSError)


def train(task: Task, interrupts: Interrupts) -> bool:
    """Train the policy of `task` to its last step. Returns whether it finished: False after Ctrl-C or
    SIGTERM, with a checkpoint to resume from. Runs on every rank."""
    steps = task.config.train.steps
    with open_run(task, interrupts) as run:
        state = run.resume()
        while state.step < steps:
            if run.session.stopping():
                checkpoint(run, state)
                run.stop(state)
                return False
            begins = state.step == 0 and state.before is None
            state = before_training(run, state) if begins else train_step(run, state)
            if state.step > 0 and due(state.step, task.config.checkpoint.every, steps):
                state = checkpoint(run, state)
            run.checkpoints.maybe_finalize()
        with rescued(run, state):
            run.finish(state)
        return True


def before_training(run: Run, state: TrainState) -> TrainState:
    began = time.perf_counter()
    synced = run.sync(0)
    evaluated = run.evaluator.success()
    run.session.log(0, {**evaluated, **synced}, time.perf_counter() - began)
    success = evaluated[HELD_OUT]
    return run.since(replace(state, before=success, after=success), began)


def train_step(run: Run, state: TrainState) -> TrainState:
    """Process one rollout batch: sample, score, train, evaluate if that is due, and log its row. A checkpoint
    is saved after the row, so that a run that resumes from it finds all its rows."""
    config, began, step = run.task.config, time.perf_counter(), state.step + 1
    with rescued(run, state):
        synced, waited, batch = sample(run, state)
    rollouts, rewards = batch.rollouts, batch.reward
    if config.train.shuffle_rewards:
        rewards = shuffled(rewards, step)
    estimated = estimate(run.task.objective.advantage, run.critic, rollouts, rewards, step)
    if config.observe.rollouts:
        with rescued(run, state):
            run.session.world.first(lambda: keep(run, batch, rewards, estimated, step))
    if told := beyond_budget(rollouts, config.train.token_budget):
        run.session.progress.say(f"step {step}: {told}")
    learned, state = learn(run, rollouts, estimated, state)
    metrics = {
        **batch.metrics,
        **estimated.metrics,
        **learned.metrics,
        **synced,
        "lr": run.policy.lr,
        "skipped_updates": learned.skipped,
        "masked_updates": learned.masked,
        "staleness": step - 1 - waited.trained,
        **ages(rollouts, step),
    }
    group = torch.tensor([rollout.group for rollout in rollouts])
    metrics["frac_zero_std_groups"] = float(zero_variance(torch.from_numpy(rewards), group))
    metrics |= run.curricula.metrics(step)
    for line in rise(run, batch, step):
        run.session.progress.say(f"step {step}: {line}")
    failure = None
    if due(step, config.evaluation.every, config.train.steps):
        failure = evaluate(run, step, metrics)
    state = run.since(replace(state, after=metrics.get(HELD_OUT, state.after)), began)
    seconds = time.perf_counter() - began
    spared = metrics.get("spared_tokens", 0.0)
    metrics |= speed(config, run.task.shape, rollouts, seconds, run.session.world.size, spared)
    with rescued(run, state):
        run.session.log(step, metrics, seconds)
        alarm(run, step, metrics)
        if learned.masked:
            run.session.progress.say(masked_line(step, learned.masked, config.train.updates))
        guard(run, learned, rollouts, state)
        if failure is not None:
            raise failure
    return state


def sample(run: Run, state: TrainState) -> tuple[dict[str, float], BatchFuture, RolloutBatch]:
    """Sync the weights to the engine and wait for the next batch, which may have been started steps ago."""
    synced = run.sync(state.step)
    waited = run.pending.next(state.step + 1, lambda number: begin(run, number, trained=state.step))
    batch = waited.wait()
    run.engine.rest()
    return synced, waited, batch


def learn(
    run: Run, rollouts: list[Rollout], estimated: AdvantageEstimate, state: TrainState
) -> tuple[UpdateResult, TrainState]:
    """Train the policy, then the critic and the rollout model, on one batch. Returns the result and the state
    after this step."""
    step = state.step + 1
    learned = run.learner.learn(rollouts, estimated.advantages, step)
    if run.critic is not None:
        learned.metrics.update(run.critic.learn(rollouts, estimated.targets, step))
    if run.rollout_model is not None:
        taught = run.rollout_model.learn(rollouts, estimated.advantages, step, state.distill_weight)
        learned.metrics.update(taught.metrics)
        state = replace(state, distill_weight=taught.weight)
    return learned, replace(state, step=step, skipped=state.skipped + 1 if learned.skipped else 0)


def rise(run: Run, batch: RolloutBatch, step: int) -> list[str]:
    """Let the sources rise to harder prompts on what was sampled for `step`. Returns a line for each rise."""
    prompts = [rollout.prompt for rollout in batch.sampled.rollouts]
    begins = step + 1 + run.task.config.rollout.staleness
    return run.curricula.observe(prompts, batch.sampled.success, begins, run.order.drawn)


def evaluate(run: Run, step: int, metrics: dict[str, float]) -> Rescued | None:
    """Add the held-out success after `step` to `metrics`. Returns an error instead of raising it, so that the
    row is written first."""
    try:
        metrics |= run.sync(step)
        metrics |= run.evaluator.success()
    except RESCUED as error:
        return error
    return None


@contextmanager
def rescued(run: Run, state: TrainState) -> Iterator[None]:
    """Save `state` if an error of RESCUED, which all ranks have, ends the run. If saving fails too, raise
    CheckpointError with both errors, which names the checkpoint to resume from."""
    try:
        yield
    except RESCUED as error:
        if state.step > 0:
            try:
                run.save(state)
                run.checkpoints.finish()
            except (CheckpointError, OSError) as second:
                raise CheckpointError(f"{error}\n{second}\n{run.usable()}") from error
            run.session.progress.say(f"step {state.step} is saved: continue with resume=true")
        raise


def keep(run: Run, batch: RolloutBatch, rewards: np.ndarray, estimated: AdvantageEstimate, step: int) -> None:
    """Store all samples. Those not trained on get the verifier's reward and the advantage 0."""
    everything = batch.sampled.reward.copy()
    everything[batch.kept] = rewards
    advantages = np.zeros(len(everything))
    advantages[batch.kept] = estimated.means
    run.store.write(step, batch.sampled.rollouts, everything.tolist(), advantages.tolist())


def checkpoint(run: Run, state: TrainState) -> TrainState:
    """Save a checkpoint, with the held-out success of the policy if it was evaluated at this step."""
    config, began = run.task.config, time.perf_counter()
    evaluated = due(state.step, config.evaluation.every, config.train.steps)
    run.save(state, state.after if evaluated else None)
    return run.since(state, began)


def alarm(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Warn when too much probability has left the support that the trust region measures."""
    outside = metrics.get("outside_mass", 0.0)
    if outside > OUTSIDE_MASS_ALARM:
        run.session.progress.say(
            f"step {step}: {outside:.3f} of the probability has left the old policy's support; raise the "
            "trust region's k, lower its delta, or read the new policy at its own support (support: own)"
        )


def masked_line(step: int, masked: int, updates: int) -> str:
    """A warning about updates that no optimizer took."""
    return (
        f"step {step}: {masked} of {updates} updates not taken, because every token of them is masked: "
        "answers cut at rollout.sampling.max_tokens (reward.overlong.mode=mask), or aborted by the engine"
    )


def guard(run: Run, learned: UpdateResult, rollouts: Sequence[Rollout], state: TrainState) -> None:
    """Report and store a batch with NaN or Inf updates. Raises Unhealthy after too many of them in a row."""
    if not learned.skipped:
        return
    kept = run.session.keep_broken(state.step, rollouts, learned.broken)
    told = f"step {state.step}: {learned.skipped} updates skipped for NaN or Inf; {kept}"
    run.session.progress.say(told)
    if state.skipped >= run.task.config.train.max_skipped:
        raise Unhealthy(f"{told}. {state.skipped} batches in a row (train.max_skipped): stopping")


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last one; every = 0: only the last."""
    return step == last or (every > 0 and step % every == 0)


def shuffled(rewards: np.ndarray, step: int) -> np.ndarray:
    """The same rewards, assigned to responses at random: the control experiment."""
    return rewards[np.random.default_rng(step).permutation(len(rewards))]
