"""One rollout batch, sampled and judged; with `rollout.refill`, of prompts that teach something."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_troll.rewards.batch import ScoredBatch, judge, together
from megatron_troll.rollout.engine import requests_for
from megatron_troll.run.queue import BatchFuture, RolloutBatch
from megatron_troll.run.run import Run


def begin(run: Run, step: int, trained: int) -> BatchFuture:
    """Begin to draw the batch of `step`, from a policy of `trained` steps. It is drawn to its end here where
    the engine does not go on by itself, and with `refill`: what is asked then depends on what came.
    Blocks."""
    position = run.order.position
    if run.task.config.rollout.refill or not run.engine.draws_elsewhere:
        collected = collect(run, step)
        return BatchFuture(trained, position, lambda: collected, collected)
    finish = _start(run, run.task.config.rollout.prompts, Counter(), step)

    def finished() -> RolloutBatch:
        judged = finish()
        return RolloutBatch(judged, np.ones(len(judged.rollouts), dtype=bool), judged.rollouts, 1)

    return BatchFuture(trained, position, finished)


def collect(run: Run, step: int) -> RolloutBatch:
    """Draw rollout.prompts prompts. While some of them got one reward for all samples, which is no gradient,
    and at most `refill` times: draw as many new ones (dynamic sampling of DAPO, arXiv 2503.14476, section
    3.2). What is still missing then is filled up with the first of those, in the order drawn. Blocks.
    """
    wanted, samples = run.task.config.rollout.prompts, run.task.config.rollout.samples
    drawn: Counter[str] = Counter()
    rounds = [_draw(run, wanted, drawn, step)]
    everything = rounds[0]
    while len(rounds) <= run.task.config.rollout.refill:
        missing = wanted - int(informative(everything.reward, samples).sum())
        if missing == 0:
            break
        rounds.append(_draw(run, missing, drawn, step))
        everything = together(rounds)
    kept = np.repeat(chosen(informative(everything.reward, samples), wanted), samples)
    rollouts = [rollout for rollout, keep in zip(everything.rollouts, kept) if keep]
    numbered = [replace(rollout, group=i // samples) for i, rollout in enumerate(rollouts)]
    return RolloutBatch(everything, kept, numbered, len(rounds))


def informative(reward: np.ndarray, samples: int) -> np.ndarray:
    """[P] bool: the prompts whose samples differ in reward, from reward [P * samples]."""
    by_prompt = reward.reshape(-1, samples)
    return (by_prompt != by_prompt[:, :1]).any(1)


def chosen(informs: np.ndarray, wanted: int) -> np.ndarray:
    """[P] bool: every prompt that `informs` [P], and of the others the first, up to `wanted` in all."""
    spare = wanted - informs.sum()
    return informs | (np.cumsum(~informs) <= spare)


def _draw(run: Run, count: int, drawn: Counter[str], step: int) -> ScoredBatch:
    """The answers to the next `count` prompts, judged."""
    return _start(run, count, drawn, step)()


def _start(run: Run, count: int, drawn: Counter[str], step: int) -> Callable[[], ScoredBatch]:
    """Ask for answers to the next `count` prompts; what is returned waits for them and judges."""
    prompts = [run.task.prompts.train[i] for i in run.order.next(count)]
    requests = requests_for(prompts, run.task.config.rollout.samples, drawn)
    with run.session.phases("generation"):
        finish = run.engine.start(requests, run.task.config.rollout.sampling, step)

    def finished() -> ScoredBatch:
        with run.session.phases("generation"):
            rollouts = finish()
        with run.session.phases("reward"):
            return judge(run.scorer, rollouts, run.session.groups.world)

    return finished
