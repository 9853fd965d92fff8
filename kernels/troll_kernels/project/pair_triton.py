"""Two sparse distributions of one row in registers, and sums over their slots: the Triton version of pair.py
and of `sweep` in solve.py. A slot outside both supports has log_q = -inf and a = log_p - log_q = 0."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(float("-inf"))
# Terms of the series of (y - 1) e^y + 1 that float32 needs for |y| < 1.
TERMS = tl.constexpr(12)


@triton.jit
def load(values, row, width, other, SLOTS: tl.constexpr):
    """Load values[row] as [SLOTS], with `other` from `width` on."""
    slot = tl.arange(0, SLOTS)
    return tl.load(values + row * width + slot, mask=slot < width, other=other)


@triton.jit
def at_ids(ids, listed, OTHER_IDS, OTHER_LOGP, VALUES, row, width, SLOTS: tl.constexpr, CHUNK: tl.constexpr):
    """The other side's `VALUES` at these ids [SLOTS], 0 for ids it does not list, and whether it lists them.
    Compares CHUNK slots of the other side at a time: comparing all at once would spill registers."""
    found = tl.zeros((SLOTS,), tl.float32)
    hits = tl.zeros((SLOTS,), tl.int32)
    for start in range(0, width, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        at, inside = row * width + slot, slot < width
        there = tl.load(OTHER_LOGP + at, mask=inside, other=LOWEST) != LOWEST
        id = tl.load(OTHER_IDS + at, mask=inside, other=-1).to(tl.int32)
        value = tl.load(VALUES + at, mask=inside & there, other=0.0)
        equal = (ids[:, None] == id[None, :]) & listed[:, None] & there[None, :]
        found += tl.sum(tl.where(equal, value[None, :], 0.0), 1)
        hits += tl.sum(equal.to(tl.int32), 1)
    return found, hits > 0


@triton.jit
def sides(
    NEW_IDS, NEW, OLD_IDS, OLD, row, new_width, old_width, default,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return log_q and a on the new side's slots, then log_q and a on the old side's slots and a mask of
    those that the new side lacks."""
    new, old = load(NEW, row, new_width, LOWEST, SLOTS), load(OLD, row, old_width, LOWEST, SLOTS)
    new_in, old_in = new != LOWEST, old != LOWEST
    if SHARED:
        log_q = tl.where(old_in, old, default)
        a = tl.where(new_in, new, default) - log_q
        listed = new_in | old_in
        log_q, a = tl.where(listed, log_q, LOWEST), tl.where(listed, a, 0.0)
        return log_q, a, tl.where(old_in, log_q, LOWEST), tl.where(old_in, a, 0.0), tl.zeros_like(old_in)
    new_ids = load(NEW_IDS, row, new_width, -1, SLOTS).to(tl.int32)
    old_ids = load(OLD_IDS, row, old_width, -1, SLOTS).to(tl.int32)
    q_there, in_old = at_ids(new_ids, new_in, OLD_IDS, OLD, OLD, row, old_width, SLOTS, CHUNK)
    p_there, in_new = at_ids(old_ids, old_in, NEW_IDS, NEW, NEW, row, new_width, SLOTS, CHUNK)
    log_q = tl.where(in_old, q_there, default)
    new_a = tl.where(new_in, new - log_q, 0.0)
    old_a = tl.where(old_in, tl.where(in_new, p_there, default) - old, 0.0)
    return tl.where(new_in, log_q, LOWEST), new_a, old, old_a, old_in & (in_new == 0)


@triton.jit
def union(x, y, SHARED: tl.constexpr, SLOTS: tl.constexpr):
    """Join the slots of both sides into [2 SLOTS]; with shared ids the first side already has them all."""
    if SHARED:
        slots = x
    else:
        slots = tl.reshape(tl.join(x, y), (2 * SLOTS,))
    return slots


@triton.jit
def kl_terms(q, pi, y):
    """pi y - (pi - q) with y = log(pi / q), without cancellation; see solve.py."""
    # sum over k of (k - 1) / k! y^k, by the ratio of consecutive coefficients.
    series = 1.0
    for term in tl.static_range(1, TERMS):
        k = TERMS + 1 - term
        series = 1.0 + series * y * (k / ((k - 1) * (k + 1)))
    return tl.where(tl.abs(y) < 1.0, 0.5 * q * series * y * y, pi * y - (pi - q))


@triton.jit
def sweep(tau, log_q, a, log_rest):
    """psi(tau), KL(pi || q), mean and variance of a under pi. log_rest: log mass of the default tokens."""
    step = tau * a
    tilted = log_q + step
    top = tl.maximum(tl.max(tilted, 0), log_rest)
    psi = top + tl.log(tl.sum(tl.exp(tilted - top), 0) + tl.exp(log_rest - top))
    pi, rest = tl.exp(tilted - psi), tl.exp(log_rest - psi)
    mean = tl.sum(pi * a, 0)
    variance = tl.sum(pi * (a - mean) * (a - mean), 0) + rest * mean * mean
    kl = tl.sum(kl_terms(tl.exp(log_q), pi, step - psi), 0) + kl_terms(tl.exp(log_rest), rest, -psi)
    return psi, kl, mean, variance
