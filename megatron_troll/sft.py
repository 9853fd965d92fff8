"""`mtroll sft`: supervised steps on demonstrations, with the trainer that RL uses."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing

from megatron_troll.data.order import PromptOrder
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import layer_remarks
from megatron_troll.objectives.supervised import Supervised
from megatron_troll.observe.trackers import Summary
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.run.evaluation import HELD_OUT, Evaluator, open_engine
from megatron_troll.run.session import Session, of_one_day, open_session
from megatron_troll.system import Interrupts
from megatron_troll.task import Task, demonstrations, prepare, sft_of
from megatron_troll.training.build import open_policy
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.trainer import PolicyTrainer, Unhealthy
from megatron_troll.types import HeadOutputs, Rollout

NOTHING = HeadOutputs(None, None, None)


def warm_start(task: Task, interrupts: Interrupts) -> bool:
    """Train on `config.sft` and export to runs/<name>/hf. Returns whether it reached the last step; an
    interrupted warm start is not resumed but run again. Runs on every rank."""
    config, sft, shown = task.config, sft_of(task.config), demonstrations(task)
    examples, order = shown.examples, PromptOrder(len(shown.examples), config.seed)
    with ExitStack() as stack:
        session = stack.enter_context(open_session(config, sft.steps, interrupts))
        if (same := of_one_day(task, session.world, prepare)) is not task:
            task, examples = same, demonstrations(same).examples
        session.progress.say(f"{task}\n{shown}")
        scorer = stack.enter_context(MixedScorer(task.rewards, progress=session.watchdog.beat))
        beat = session.watchdog.beat
        policy = open_policy(config.policy, task.shape, session.groups, config.seed, sft.steps, beat)
        engine = stack.enter_context(closing(open_engine(task, policy.model)))
        for line in layer_remarks(policy.model):
            session.progress.say(line)
        evaluator = Evaluator(task, session, engine, scorer)
        trainer = PolicyTrainer(policy, Supervised(), Head(policy.model, chunk=config.train.head_chunk))
        batcher = MicroBatcher(config, policy.model, config.policy.layout)
        session.begin_at(0)
        engine.sync(0)
        before = evaluator.success()
        session.log(0, before, session.seconds)
        for step in range(1, sft.steps + 1):
            if session.stopping():
                session.progress.say(
                    f"stopped after step {step - 1}; a warm start is not resumed: "
                    f"delete {session.folder.root} and run it again"
                )
                return False
            chosen = [examples[i] for i in order.next(sft.sequences)]
            supervised_step(session, trainer, batcher, chosen, step)
        engine.sync(sft.steps)
        after = evaluator.success()[HELD_OUT]
        summary = Summary(before[HELD_OUT], after, session.seconds, config.seed)
        session.complete(policy.model, summary, task.stops.exported)
    return True


def supervised_step(
    session: Session, trainer: PolicyTrainer, batcher: MicroBatcher, chosen: list[Rollout], step: int
) -> None:
    """Take one optimizer step on `chosen` and log it."""
    began = time.perf_counter()
    batches = batcher.supervised(chosen)
    if not batches:
        session.progress.say(f"step {step}: not taken, because every token of its demonstrations is masked")
        session.log(step, {"masked_updates": 1}, time.perf_counter() - began)
        return
    with session.phases("forward_backward"):
        gradients = trainer.accumulate(batches, [NOTHING] * len(batches), [None] * len(batches))
    with session.phases("optimizer"):
        grad_norm = trainer.trainable.step_if_finite(gradients.loss)
        if grad_norm is None:
            raise unhealthy(session, chosen, trainer.agree_on(gradients.broken), step)
    seconds = time.perf_counter() - began
    tokens = sum(len(r.response_ids) + 1 for r in chosen)
    metrics = {
        "loss": gradients.loss,
        "grad_norm": grad_norm,
        "lr": trainer.trainable.lr,
        "entropy": gradients.metrics["entropy"],
        "tokens_per_s": tokens / seconds,
    }
    session.log(step, metrics, seconds)


def unhealthy(session: Session, chosen: list[Rollout], broken: Sequence[int], step: int) -> Unhealthy:
    """The error that ends a warm start: stores the batch and names the demonstrations. Blocks."""
    kept = session.keep_broken(step, chosen, broken)
    return Unhealthy(f"step {step}: the loss or a gradient is NaN or Inf; {kept}; lower optimizer.lr")
