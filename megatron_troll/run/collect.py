"""Sample and score one rollout batch; with `rollout.refill`, replace prompts that give no gradient."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_troll.rewards.batch import ScoredBatch, judge, together
from megatron_troll.rollout.engine import requests_for
from megatron_troll.run.queue import BatchFuture, RolloutBatch
from megatron_troll.run.run import Run


def begin(run: Run, step: int, trained: int) -> BatchFuture:
    """Begin to sample the batch of `step`, from a policy of `trained` steps. The batch is finished here if
    the engine does not sample in the background, or if `refill` is set, because its later requests depend on
    the rewards. Blocks."""
    position = run.order.position
    if run.task.config.rollout.refill or not run.engine.generates_elsewhere:
        collected = collect(run, step)
        return BatchFuture(trained, position, lambda: collected, collected)
    finish = _start(run, run.task.config.rollout.prompts, Counter(), step)

    def finished() -> RolloutBatch:
        judged = finish()
        return RolloutBatch(judged, np.ones(len(judged.rollouts), dtype=bool), judged.rollouts, 1)

    return BatchFuture(trained, position, finished)


def collect(run: Run, step: int) -> RolloutBatch:
    """Sample for rollout.prompts prompts. A prompt whose samples all have the same reward gives no gradient:
    at most `refill` times, sample for as many new prompts as are missing (dynamic sampling of DAPO, arXiv
    2503.14476, section 3.2). If some are still missing then, the first prompts without gradient fill the
    batch, in the order sampled. Blocks.
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
    """[P] bool: whether the samples of a prompt differ in reward, from reward [P * samples]."""
    by_prompt = reward.reshape(-1, samples)
    return (by_prompt != by_prompt[:, :1]).any(1)


def chosen(informs: np.ndarray, wanted: int) -> np.ndarray:
    """[P] bool: every prompt marked in `informs` [P], then the first of the others, up to `wanted` in all."""
    spare = wanted - informs.sum()
    return informs | (np.cumsum(~informs) <= spare)


def _draw(run: Run, count: int, drawn: Counter[str], step: int) -> ScoredBatch:
    """Sample for the next `count` prompts and score the samples."""
    return _start(run, count, drawn, step)()


def _start(run: Run, count: int, drawn: Counter[str], step: int) -> Callable[[], ScoredBatch]:
    """Request samples for the next `count` prompts. The returned function waits for them and scores them."""
    requests = requests_for(
        run.order.next(count, run.curricula.stages(step)), run.task.config.rollout.samples, drawn
    )
    with run.session.phases("generation"):
        finish = run.engine.start(requests, run.task.config.rollout.sampling, step)

    def finished() -> ScoredBatch:
        with run.session.phases("generation"):
            rollouts = finish()
        with run.session.phases("reward"):
            return judge(run.scorer, rollouts, run.session.groups.world, run.session.progress.say)

    return finished
