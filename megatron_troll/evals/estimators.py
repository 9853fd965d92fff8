"""Estimators of pass@k, maj@k and their intervals from n samples per prompt. Pure numpy; all float64.

Every estimate is the exact expectation over subsets of k of the n samples, without replacement, all equally
likely; only the interval over prompts is random (bootstrap).
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000


def pass_at(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """pass@k of prompts with `right` [P] successes among n = `samples`: 1 - C(n - c, k) / C(n, k), as the
    product over i = n - c + 1 .. n of 1 - k / i (Chen et al., arXiv 2107.03374, section 2.1). 1 <= k <= n."""
    missed = np.ones(len(right))
    for i in range(1, samples + 1):
        missed *= np.where(i > samples - right, max(0.0, 1 - k / i), 1.0)
    return 1 - missed


def majority_at(votes: Sequence[str | None], success: np.ndarray, k: int) -> float:
    """maj@k of one prompt: the expected success of the most frequent vote among k of its n samples.

    votes [n], None if a sample has no answer: it does not vote. The worth of an answer is the mean `success`
    [n] of the samples that gave it. Ties are broken uniformly; if none of the k samples votes, success is 0.
    1 <= k <= n; time grows as n k^2.
    """
    n, sizes, worth = len(votes), *_classes(votes, success)
    blanks = _binomial(n - sum(sizes), k / n)
    classes = [(_binomial(size, k / n), value) for size, value in zip(sizes, worth)]
    most = min(k, max(sizes, default=0))
    won = sum(_won_with(count, blanks, classes, k) for count in range(1, most + 1))
    return float(won / _binomial(n, k / n)[k])


def interval(values: np.ndarray, seed: int) -> np.ndarray:
    """[2, M] percentile bootstrap over prompts: the ends of the CONFIDENCE interval of the mean of each
    column of `values` [P, M], from RESAMPLES resamples of P prompts that all columns share."""
    rng = np.random.default_rng(seed)
    prompts = len(values)
    means = [values[rng.integers(prompts, size=prompts)].mean(0) for _ in range(RESAMPLES)]
    outside = (1 - CONFIDENCE) / 2
    return np.quantile(means, [outside, 1 - outside], axis=0)


def _classes(votes: Sequence[str | None], success: np.ndarray) -> tuple[list[int], list[float]]:
    """Size and mean success of each distinct vote."""
    members: dict[str, list[float]] = {}
    for vote, value in zip(votes, success, strict=True):
        if vote is not None:
            members.setdefault(vote, []).append(float(value))
    return [len(m) for m in members.values()], [sum(m) / len(m) for m in members.values()]


def _binomial(n: int, p: float) -> np.ndarray:
    """[n + 1] probabilities. Independent binomials conditioned on their sum are distributed like sampling
    without replacement, for any p. With p = k / n, C(n, k) does not overflow and the probability of the sum k
    does not underflow."""
    if p == 1:
        return np.eye(n + 1)[n]
    x = np.arange(n + 1)
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in x]
    return np.exp(ways + x * math.log(p) + (n - x) * math.log1p(-p))


def _won_with(count: int, blanks: np.ndarray, classes: Sequence[tuple[np.ndarray, float]], k: int) -> float:
    """Probability that k samples are chosen and the most frequent answers have `count` votes each, times the
    mean worth of these answers."""
    # [z, t]: probability that z samples are chosen so far, t answers have `count` votes and none has more.
    # `worth` is that probability times the summed worth of the t answers.
    chance = np.zeros((k + 1, k // count + 1))
    drawn = min(k + 1, len(blanks))
    chance[:drawn, 0] = blanks[:drawn]
    worth = np.zeros_like(chance)
    for law, value in classes:
        next_chance, next_worth = np.zeros_like(chance), np.zeros_like(worth)
        for x in range(min(count, len(law))):
            next_chance[x:] += law[x] * chance[: k + 1 - x]
            next_worth[x:] += law[x] * worth[: k + 1 - x]
        if count < len(law):
            before = chance[: k + 1 - count, :-1]
            next_chance[count:, 1:] += law[count] * before
            next_worth[count:, 1:] += law[count] * (worth[: k + 1 - count, :-1] + value * before)
        chance, worth = next_chance, next_worth
    return float((worth[k, 1:] / np.arange(1, chance.shape[1])).sum())
