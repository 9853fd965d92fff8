"""Quality of the estimators of KL(policy || reference) on a pool of sampled responses.

The methods of slot `kl` themselves compute the values. Bias is measured against the exact KL of the pool's
positions; whole responses are resampled, because the tokens of one response depend on each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from troll_kernels import sparsify
from troll_kernels.topk import largest

from megatron_troll.objectives.kl.exact import ExactKl
from megatron_troll.objectives.kl.k1 import K1
from megatron_troll.objectives.kl.k2 import K2
from megatron_troll.objectives.kl.k3 import K3
from megatron_troll.objectives.kl.tike import Tike
from megatron_troll.objectives.reference import ReferenceKl
from megatron_troll.objectives.sampled_kl import SampledKl
from megatron_troll.objectives.slots import Policy, Term
from megatron_troll.types import NO_ID, HeadOutputs, ObjectiveInputs, Segments, Support, TopK

RESAMPLES = 2_000
# Edges of the intervals of top-k probability mass.
REGIMES = (0.0, 0.9, 0.99, 0.999, 0.9999, 1.0)


@dataclass(frozen=True)
class TokenPool:
    """N sampled tokens with both models' full rows.

    policy, reference  [N, V] log-probabilities (or logits: only differences within a row matter)
    target             [N] sampled token
    response           [N] int64, index of its response, counted from 0
    """

    policy: Tensor
    reference: Tensor
    target: Tensor
    response: Tensor

    @property
    def vocab(self) -> int:
        return self.policy.shape[1]


@dataclass(frozen=True)
class Quality:
    """Quality of one estimator, nats per token, against the exact KL of the same positions. expected: bias in
    expectation over the token at each position; bias +- standard_error: with the sampled tokens; spread[i]:
    standard deviation of the mean over sizes[i] responses; negative[i]: the share of such means below 0."""

    expected: float
    bias: float
    standard_error: float
    spread: tuple[float, ...]
    negative: tuple[float, ...]


@dataclass(frozen=True)
class Residual:
    """Exact minus truncated KL at positions with top-k mass in [low, high). share: of all positions; mean and
    size: its mean and mean absolute value there, nats; exact: mean exact KL there."""

    k: int
    low: float
    high: float
    share: float
    mean: float
    size: float
    exact: float


def estimators(ks: Sequence[int]) -> dict[str, ReferenceKl]:
    """Estimators by name, with weight 1. Old and new policy are the same on the pool, so every importance
    weight is 1."""
    known: dict[str, ReferenceKl] = {
        "k1": K1(beta=1.0),
        "k2": K2(beta=1.0),
        "k3": K3(beta=1.0),
        "k3 without limits": K3(beta=1.0, clamp=False),
        "exact": ExactKl(beta=1.0),
    }
    return known | {f"tike {k}": Tike(beta=1.0, k=k) for k in ks}


def estimate(method: ReferenceKl, pool: TokenPool) -> Term:
    """The method's value [N] and its diagnostics."""
    inputs = _inputs(method, pool)
    logp = inputs.new.logp
    assert logp is not None
    return method.penalty(inputs, Policy(logp, logp.detach(), torch.zeros_like(logp)), None)


def expectation(method: ReferenceKl, pool: TokenPool) -> Tensor:
    """[N] expectation of the method over the token sampled at each position. Holds N x V for methods that
    read only the sampled token; the others do not depend on it."""
    if not isinstance(method, SampledKl):
        return estimate(method, pool).value
    logp, reference = (rows.log_softmax(1) for rows in (pool.policy.double(), pool.reference.double()))
    return (logp.exp() * method.of_log_ratio(logp - reference)).sum(1)


def qualities(
    values: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    response: Tensor,
    sizes: Sequence[int],
    seed: int = 0,
) -> dict[str, Quality]:
    """Quality of each estimator, from its values [N] and expectations [N]; `values["exact"]` is the truth."""
    owner = response.numpy()
    count = np.bincount(owner).astype(np.float64)
    sums = {name: np.bincount(owner, value.double().numpy()) for name, value in values.items()}
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, len(count), (RESAMPLES, size)) for size in sizes]

    def quality(name: str) -> Quality:
        means = [sums[name][rows].sum(1) / count[rows].sum(1) for rows in drawn]
        bias = (sums[name] - sums["exact"]).sum() / count.sum()
        off = sums[name] - sums["exact"] - bias * count
        return Quality(
            expected=float(expected[name].double().mean() - values["exact"].double().mean()),
            bias=float(bias),
            standard_error=float(np.sqrt((off**2).sum()) / count.sum()),
            spread=tuple(float(mean.std()) for mean in means),
            negative=tuple(float((mean < 0).mean()) for mean in means),
        )

    return {name: quality(name) for name in values}


def residuals(k: int, term: Term, exact: Tensor) -> list[Residual]:
    """Residuals of TIKE with this k, per interval of REGIMES; intervals without positions are left out."""
    mass, left_out = term.per_token["reference_kl_mass"], exact - term.value
    found = []
    for low, high in pairwise(REGIMES):
        inside = (mass >= low) & ((mass < high) if high < 1 else True)
        if bool(inside.any()):
            here = left_out[inside]
            figures = (inside.double().mean(), here.mean(), here.abs().mean(), exact[inside].mean())
            found.append(Residual(k, low, high, *(float(figure) for figure in figures)))
    return found


def seconds(method: ReferenceKl, pool: TokenPool, repeats: int) -> float:
    """Seconds per 1,000 tokens to read both rows, forward and backward: the fastest of `repeats`."""
    taken = []
    for _ in range(repeats):
        rows = pool.policy.clone().requires_grad_()
        began = perf_counter()
        estimate(method, TokenPool(rows, pool.reference, pool.target, pool.response)).value.sum().backward()
        taken.append(perf_counter() - began)
    return 1_000 * min(taken) / len(pool.target)


def _inputs(method: ReferenceKl, pool: TokenPool) -> ObjectiveInputs:
    """Inputs of the method, as the LM head would read them from the rows."""
    rows, reference = pool.policy.log_softmax(1), pool.reference.log_softmax(1)
    kl = record = at_record = None
    if method.reads.reference_kl:
        kl = (rows.exp() * (rows - reference)).sum(1)
    if method.reads.topk is not None:
        record = _record(rows, pool.target, method.reads.topk)
        at_record = replace(record, logits=_at(reference, record.ids))
    logp, reference_logp = (at.gather(1, pool.target[:, None])[:, 0] for at in (rows, reference))
    new = HeadOutputs(logp, record, None, reference_kl=kl)
    beside = HeadOutputs(reference_logp, at_record, None)
    ones = torch.ones_like(logp.detach())
    return ObjectiveInputs(
        new=new,
        old=HeadOutputs(logp.detach(), None, None),
        rollout_logp=logp.detach(),
        rollout_topk=None,
        advantage=ones,
        weight=ones,
        position=torch.zeros_like(pool.response),
        segments=_whole(pool.response),
        group=pool.response.unique(),
        rollout=pool.response.unique(),
        rollouts=int(pool.response.max()) + 1,
        uniform=ones,
        reference=beside,
    )


def _record(logp: Tensor, target: Tensor, support: Support) -> TopK:
    """The policy's record at its own top-K, from its log-probabilities [N, V]; ties ordered by token id."""
    with torch.no_grad():
        values, candidates = largest(logp, min(support.k, logp.shape[1]))
        lse, at_target = torch.zeros_like(logp[:, 0]), logp.gather(1, target[:, None])[:, 0]
        ids, _, count, place = sparsify.select(values, candidates, lse, target, at_target, support.delta)
    return TopK(ids, _at(logp, ids), count, place, lse, logp.shape[1])


def _at(logp: Tensor, ids: Tensor) -> Tensor:
    """[N, W] values of `logp` at `ids`, -inf on unused slots."""
    return logp.gather(1, ids.clamp(min=0)).masked_fill(ids == NO_ID, -torch.inf)


def _whole(response: Tensor) -> Segments:
    """Segments that raise on every reduction: estimators look at single tokens, not at responses."""

    def refuse(values: Tensor) -> Tensor:
        raise NotImplementedError("an estimator of the KL looks at single tokens")

    return Segments(refuse, refuse, refuse, refuse, response)
