"""The algorithm: prompts, rollouts, rewards, advantages, updates; now and then an evaluation."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_troll.advantages import zero_variance
from megatron_troll.rollout.engine import EngineError
from megatron_troll.run.collect import begin
from megatron_troll.run.queue import BatchFuture, RolloutBatch, ages
from megatron_troll.run.run import Run, TrainState, open_run
from megatron_troll.system import Interrupts
from megatron_troll.task import Task
from megatron_troll.training.critic import AdvantageEstimate, estimate
from megatron_troll.training.throughput import speed
from megatron_troll.training.trainer import Unhealthy, UpdateResult
from megatron_troll.types import Rollout

# Probability outside the old support beyond which KL on that support means little (ALGORITHMS 1.8).
OUTSIDE_MASS_ALARM = 1e-2


def train(task: Task, interrupts: Interrupts) -> bool:
    """Train the policy of `task` to its last step. Returns whether it got there: False after Ctrl-C or
    SIGTERM, with a checkpoint to resume from. Runs on every rank."""
    steps = task.config.train.steps
    with open_run(task, interrupts) as run:
        standing = run.resume()
        while standing.step < steps:
            if run.session.stopping():
                checkpoint(run, standing)
                run.stop(standing)
                return False
            begins = standing.step == 0 and standing.before is None
            standing = before_training(run, standing) if begins else train_step(run, standing)
            if standing.step > 0 and due(standing.step, task.config.checkpoint.every, steps):
                standing = checkpoint(run, standing)
            run.checkpoints.maybe_finalize()
        run.finish(standing)
        return True


def before_training(run: Run, standing: TrainState) -> TrainState:
    began = time.perf_counter()
    synced = run.sync(0)
    success = run.evaluator.success()
    run.session.log(0, {"held_out_success": success, **synced}, time.perf_counter() - began)
    return run.since(replace(standing, before=success, after=success), began)


def train_step(run: Run, standing: TrainState) -> TrainState:
    """One rollout batch: sample, judge, learn, evaluate where that is due, write its row. A checkpoint comes
    after the row: a run that continues from it finds all its rows."""
    config, began, step = run.task.config, time.perf_counter(), standing.step + 1
    synced, waited, batch = sample(run, standing)
    rollouts, rewards = batch.rollouts, batch.reward
    if config.train.shuffle_rewards:
        rewards = shuffled(rewards, step)
    estimated = estimate(run.task.objective.advantage, run.critic, rollouts, rewards, step)
    if config.observe.rollouts:
        run.session.on_first(lambda: keep(run, batch, rewards, estimated, step))
    learned, standing = learn(run, rollouts, estimated, standing)
    metrics = {
        **batch.metrics,
        **estimated.metrics,
        **learned.metrics,
        **synced,
        "lr": run.policy.lr,
        "skipped_updates": learned.skipped,
        "staleness": step - 1 - waited.trained,
        **ages(rollouts, step),
    }
    group = torch.tensor([rollout.group for rollout in rollouts])
    metrics["frac_zero_std_groups"] = float(zero_variance(torch.from_numpy(rewards), group))
    failure = None
    if due(step, config.evaluation.every, config.train.steps):
        failure = evaluate(run, step, metrics)
        standing = replace(standing, after=metrics.get("held_out_success", standing.after))
    seconds = time.perf_counter() - began
    metrics |= speed(config, run.task.shape, rollouts, seconds, run.session.groups.world.size)
    run.session.log(step, metrics, seconds)
    alarm(run, step, metrics)
    guard(run, learned, rollouts, standing)
    standing = run.since(standing, began)
    if failure is not None:
        rescue(run, standing)
        raise failure
    return standing


def sample(run: Run, standing: TrainState) -> tuple[dict[str, float], BatchFuture, RolloutBatch]:
    """Weights to the engine, and the next batch from it, whenever it was begun."""
    try:
        synced = run.sync(standing.step)
        waited = run.pending.next(standing.step + 1, lambda number: begin(run, number, trained=standing.step))
        batch = waited.wait()
        run.engine.rest()
    except EngineError:
        rescue(run, standing)
        raise
    return synced, waited, batch


def learn(
    run: Run, rollouts: list[Rollout], estimated: AdvantageEstimate, standing: TrainState
) -> tuple[UpdateResult, TrainState]:
    """The policy, then the critic and the rollout model, from one batch; the run stands a step further."""
    step = standing.step + 1
    learned = run.learner.learn(rollouts, estimated.advantages, step)
    if run.critic is not None:
        learned.metrics.update(run.critic.learn(rollouts, estimated.targets, step))
    if run.rollout_model is not None:
        taught = run.rollout_model.learn(rollouts, estimated.advantages, step, standing.distill_weight)
        learned.metrics.update(taught.metrics)
        standing = replace(standing, distill_weight=taught.weight)
    return learned, replace(standing, step=step, skipped=standing.skipped + 1 if learned.skipped else 0)


def evaluate(run: Run, step: int, metrics: dict[str, float]) -> EngineError | None:
    """Add the held-out success after `step` to its row; what the engine failed at, where it did: the row is
    to be written in any case."""
    try:
        metrics |= run.sync(step)
        metrics["held_out_success"] = run.evaluator.success()
    except EngineError as error:
        return error
    return None


def rescue(run: Run, standing: TrainState) -> None:
    """A checkpoint before the run ends for want of an engine."""
    if standing.step > 0:
        run.save(standing)
        run.checkpoints.finish()
        run.session.progress.say(
            f"the engine failed; step {standing.step} is saved: continue with resume=true"
        )


def keep(run: Run, batch: RolloutBatch, rewards: np.ndarray, estimated: AdvantageEstimate, step: int) -> None:
    """Store everything sampled, also what is not trained on: with the verifier's reward and no advantage."""
    everything = batch.sampled.reward.copy()
    everything[batch.kept] = rewards
    advantages = np.zeros(len(everything))
    advantages[batch.kept] = estimated.means
    run.store.write(step, batch.sampled.rollouts, everything.tolist(), advantages.tolist())


def checkpoint(run: Run, standing: TrainState) -> TrainState:
    """Save, with the held-out success of the policy where it was evaluated."""
    config, began = run.task.config, time.perf_counter()
    evaluated = due(standing.step, config.evaluation.every, config.train.steps)
    run.save(standing, standing.after if evaluated else None)
    return run.since(standing, began)


def alarm(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Say so when the trust region no longer sees what the policy does."""
    outside = metrics.get("outside_mass", 0.0)
    if outside > OUTSIDE_MASS_ALARM:
        run.session.progress.say(
            f"step {step}: {outside:.3f} of the probability has left the old policy's support; raise the "
            "trust region's k, lower its delta, or read the new policy at its own support (support: own)"
        )


def guard(run: Run, learned: UpdateResult, rollouts: Sequence[Rollout], standing: TrainState) -> None:
    """Say and keep what made an update NaN or Inf; end the run when it does not stop. Raises Unhealthy."""
    if not learned.skipped:
        return
    kept = run.session.keep_broken(standing.step, rollouts, learned.broken)
    told = f"step {standing.step}: {learned.skipped} updates skipped for NaN or Inf; {kept}"
    run.session.progress.say(told)
    if standing.skipped >= run.task.config.train.max_skipped:
        raise Unhealthy(f"{told}. {standing.skipped} batches in a row (train.max_skipped): stopping")


def due(step: int, every: int, last: int) -> bool:
    """At every `every`-th step and at the last one; 0: only at the last."""
    return step == last or (every > 0 and step % every == 0)


def shuffled(rewards: np.ndarray, step: int) -> np.ndarray:
    """The control experiment: the same rewards, given to responses at random."""
    return rewards[np.random.default_rng(step).permutation(len(rewards))]
