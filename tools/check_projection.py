"""Measure the TROLL projection in float32 against float64 roots, on pairs of policies that make solvers
fail.

    python tools/check_projection.py [--pairs 100000]

Prints, for each kind of pair, the relative error of tau, and how far KL(pi || old) exceeds its bound, both
computed in float64 from the same float32 inputs. Exits with 1 if, over all pairs, the 99th percentile of the
error is above 1e-5, or any KL is above bound * (1 + 1e-4).
"""

import argparse
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from troll_kernels.project import Projection, project
from troll_kernels.sparsify import NO_ID, sparse_logp

VOCAB, P_D, WIDTH = 151_936, 1e-12, 64
# Ids are below this: a dense row [TOKENS + 1] holds both supports, and one slot for all other tokens.
TOKENS = 4 * WIDTH
BOUNDS = (1e-4, 0.25)
MAX_ERROR, MAX_EXCESS = 1e-5, 1e-4
BATCH = 2000


class Kind(NamedTuple):
    """Logits are spread * x for the old policy, and spread * x + drift * y for the new one, with x and y from
    Student's t; a small `freedom` gives heavy tails. `shared` of the `width` slots hold the same ids in both
    policies. `near`: bounds within 1 % of the KL, so that the projection hardly moves."""

    spread: float
    drift: float
    shared: int = WIDTH
    width: int = WIDTH
    freedom: float = 100.0
    near: bool = False


KINDS = {
    "small step": Kind(4.0, 0.3),
    "large step": Kind(4.0, 2.0),
    "half the ids shared": Kind(4.0, 0.5, shared=WIDTH // 2),
    "disjoint": Kind(4.0, 1.0, shared=0),
    "one-hot, same ids": Kind(40.0, 40.0),
    "one-hot, other ids": Kind(0.0, 0.0, shared=0, width=1),
    "two tokens": Kind(2.0, 2.0, width=2, shared=2),
    "flat": Kind(0.05, 0.05),
    "heavy tails": Kind(4.0, 2.0, freedom=1.2),
    "near the bound": Kind(4.0, 0.1, near=True),
}


class Pairs(NamedTuple):
    """Two sparse policies per row, float32 log-probs [N, W] with -inf on unused slots, and bound [N]."""

    new_ids: Tensor
    new: Tensor
    old_ids: Tensor
    old: Tensor
    bound: Tensor

    def projected(self) -> Projection:
        return project(self.new_ids, self.new, self.old_ids, self.old, self.bound, VOCAB, P_D)


class Accuracy(NamedTuple):
    """Relative error [M] of tau on rows that the projection moves; excess [N] = KL after / bound - 1."""

    error: Tensor
    excess: Tensor


def draw(kind: Kind, rows: int, generator: torch.Generator) -> Pairs:
    """Generate pairs: supports of every size up to the kind's width, bounds log-uniform over BOUNDS."""
    width, shared = kind.width, kind.shared
    ids = torch.rand(rows, TOKENS, generator=generator).argsort(1)
    x = kind.spread * _sample(kind.freedom, (rows, TOKENS), generator)
    y = kind.drift * _sample(kind.freedom, (rows, TOKENS), generator)
    count = torch.randint(1, width + 1, (rows,), generator=generator)
    old_ids, old = _policy(ids[:, :width], x, count)
    if shared == width:
        new_ids, new = old_ids, _policy(old_ids, x + y, count)[1]
    else:
        count = torch.randint(1, width + 1, (rows,), generator=generator)
        new_ids, new = _policy(ids[:, width - shared : 2 * width - shared], x + y, count)
    low, high = BOUNDS
    bound = low * (high / low) ** torch.rand(rows, generator=generator)
    pairs = Pairs(new_ids, new, old_ids, old, bound)
    if kind.near:
        offset = 0.01 * (2.0 * torch.rand(rows, generator=generator) - 1.0)
        pairs = pairs._replace(bound=(pairs.projected().kl_before * (1.0 + offset)).clamp(low, high))
    return pairs


def _sample(freedom: float, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Samples of Student's t, clamped to [-100, 100]."""
    normal = torch.randn(shape, generator=generator)
    chi2 = 2.0 * torch._standard_gamma(torch.full(shape, freedom / 2.0), generator)
    return (normal * (freedom / chi2).sqrt()).clamp(-100.0, 100.0)


def _policy(ids: Tensor, logits: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The first `count` of ids [N, W] and their log-probs under logits [N, TOKENS]."""
    used = torch.arange(ids.shape[1]) < count[:, None]
    logp = sparse_logp(logits.gather(1, ids.clamp(min=0)), count, VOCAB, P_D)
    return ids.where(used, NO_ID), logp


def measure(pairs: Pairs, result: Projection) -> Accuracy:
    log_q, multiplicity = _dense(pairs.old_ids, pairs.old, torch.tensor(P_D).log())
    log_p, _ = _dense(pairs.new_ids, pairs.new, torch.tensor(P_D).log())
    # Rounding leaves the sums of float32 inputs slightly off 1; KL is defined between distributions.
    log_q = log_q - torch.logsumexp(log_q + multiplicity.log(), 1, keepdim=True)
    moved = result.active
    tau = _root(log_q[moved], (log_p - log_q)[moved], multiplicity[moved], pairs.bound[moved].double())
    log_pi, _ = _dense(pairs.old_ids, result.old, result.default)
    new_slots = pairs.new_ids.where(pairs.new_ids >= 0, TOKENS)
    outside = log_pi[:, -1:].clone()
    log_pi = log_pi.scatter(1, new_slots, result.new.double())
    log_pi[:, -1:] = outside
    log_pi = log_pi - torch.logsumexp(log_pi + multiplicity.log(), 1, keepdim=True)
    kl = (multiplicity * log_pi.exp() * (log_pi - log_q)).sum(1)
    return Accuracy((result.tau[moved].double() / tau - 1.0).abs(), kl / pairs.bound.double() - 1.0)


def _dense(ids: Tensor, logp: Tensor, default: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs by token id [N, TOKENS + 1] in float64, the last slot for every other token, and how many
    tokens each slot stands for."""
    rows = default.double().broadcast_to(len(ids))[:, None].repeat(1, TOKENS + 1)
    kept = logp.double().where(ids >= 0, 0.0)
    rest = rows[:, -1:].clone()
    rows = rows.scatter(1, ids.where(ids >= 0, TOKENS), kept)
    rows[:, -1:] = rest
    multiplicity = torch.ones_like(rows)
    multiplicity[:, -1] = VOCAB - TOKENS
    return rows, multiplicity


def _root(log_q: Tensor, a: Tensor, multiplicity: Tensor, bound: Tensor) -> Tensor:
    """Bisection in log tau of KL(pi || q) = bound, by the plain formula in float64; all [M, TOKENS + 1]."""
    low, high = torch.full_like(bound, -30.0), torch.zeros_like(bound)
    for _ in range(60):
        middle = (low + high) / 2.0
        log_pi = log_q + middle.exp()[:, None] * a
        log_pi = log_pi - torch.logsumexp(log_pi + multiplicity.log(), 1, keepdim=True)
        above = (multiplicity * log_pi.exp() * (log_pi - log_q)).sum(1) > bound
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2.0).exp()


def accuracy(kind: Kind, rows: int, generator: torch.Generator) -> Accuracy:
    batches = (draw(kind, min(BATCH, rows - start), generator) for start in range(0, rows, BATCH))
    parts = [measure(pairs, pairs.projected()) for pairs in batches]
    return Accuracy(*(torch.cat(part) for part in zip(*parts)))


def main() -> int:
    parser = argparse.ArgumentParser(description="accuracy of the TROLL projection")
    parser.add_argument("--pairs", type=int, default=100_000)
    generator = torch.Generator().manual_seed(0)
    each = parser.parse_args().pairs // len(KINDS)
    print(f"{'kind':22} {'moved':>7} {'tau p50':>9} {'tau p99':>9} {'tau max':>9} {'KL excess':>10}")
    total = []
    for name, kind in KINDS.items():
        total.append(accuracy(kind, each, generator))
        _show(name, total[-1])
    whole = Accuracy(*(torch.cat(part) for part in zip(*total)))
    _show("all", whole)
    return 0 if whole.error.quantile(0.99) <= MAX_ERROR and whole.excess.max() <= MAX_EXCESS else 1


def _show(name: str, part: Accuracy) -> None:
    half, most = part.error.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64))
    error = f"{half:9.1e} {most:9.1e} {part.error.max():9.1e}"
    print(f"{name:22} {len(part.error):7} {error} {part.excess.max():10.1e}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
