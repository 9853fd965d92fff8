"""Random numbers against a SplitMix64 in plain integers, draws against the law they are drawn from."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.batching.uniforms import uniforms
from megatron_troll.config import Sampling
from megatron_troll.rollout.sampling import keep, sample, sample_key

MASK = 2**64 - 1
LARGEST_UNIFORM = 1 - 2.0**-53


def split_mix(key: int, position: int) -> float:
    """The (position + 1)-th output of SplitMix64 seeded with `key`, as the reference C code has it."""
    state = key
    for _ in range(position + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_split_mix_gives_the_published_first_output() -> None:
    assert split_mix(0, 0) == (0xE220A8397B1DCDAF >> 11) / 2**53


@pytest.mark.parametrize("position", [0, 1, 17, 1000])
def test_uniforms_equal_split_mix_in_plain_integers(position: int) -> None:
    keys = [0, 1, MASK, 2**63, sample_key(3, 1, "prompt", 2)]
    assert uniforms(keys, position).tolist() == [split_mix(key, position) for key in keys]


def test_keys_differ_in_every_part_and_are_pinned() -> None:
    keys = {
        sample_key(seed, round, prompt, sample)
        for seed in (0, 1, 11)
        for round in (-1, 1, 11)
        for prompt in ("a", "1", "1/1", "")
        for sample in (0, 1, 11)
    }
    assert len(keys) == 3 * 3 * 4 * 3
    assert all(0 <= key <= MASK for key in keys)
    by_b2sum = bytes.fromhex("65f646af8dc12e12")  # printf 0/1/gsm8k-7/2 | b2sum -l 64
    assert sample_key(0, 1, "gsm8k-7", 2) == int.from_bytes(by_b2sum, "little")


def unit_draws(n_keys: int, n_positions: int) -> np.ndarray:
    """[n_keys, n_positions] of neighbouring samples of one prompt."""
    keys = [sample_key(0, 0, "p", sample) for sample in range(n_keys)]
    return np.stack([uniforms(keys, position) for position in range(n_positions)], 1)


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """sqrt(n) times the largest distance from the uniform distribution; above 1.95 once in a thousand."""
    ordered = np.sort(values)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return math.sqrt(len(ordered)) * distance


def test_uniforms_are_uniform_over_samples_and_over_positions() -> None:
    draws = unit_draws(400, 100)
    assert kolmogorov_smirnov(draws.ravel()) < 1.95
    assert max(kolmogorov_smirnov(draws[:, position]) for position in range(100)) < 2.4
    assert max(kolmogorov_smirnov(draws[sample]) for sample in range(100)) < 2.4


@pytest.mark.parametrize(("row_lag", "column_lag"), [(0, 1), (0, 2), (1, 0), (1, 1)])
def test_uniforms_of_neighbours_are_independent(row_lag: int, column_lag: int) -> None:
    draws = unit_draws(400, 100)
    first = draws[: 400 - row_lag, : 100 - column_lag].ravel()
    second = draws[row_lag:, column_lag:].ravel()
    counts = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])[0]
    assert chi_square(counts.ravel(), np.full(64, len(first) / 64)) < 4.0


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty 1931)."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def law(seed: int, rows: int = 1, size: int = 20) -> Tensor:
    """Log-probabilities [rows, size]."""
    return (2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def draw_many(logp: Tensor, sampling: Sampling, n: int = 20_000) -> Tensor:
    """[n] draws from the one row of `logp`."""
    uniform = torch.from_numpy(uniforms([sample_key(0, 0, "p", i) for i in range(n)], 0))
    return sample(logp.expand(n, -1), uniform, sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_p=0.9),
        Sampling(top_k=7),
        Sampling(min_p=0.05),
        Sampling(top_p=0.95, top_k=9, min_p=0.02),
    ],
    ids=str,
)
def test_draws_follow_the_kept_probabilities(sampling: Sampling) -> None:
    logp = law(1)
    kept = torch.from_numpy(brute_force_keep(logp[0].exp().numpy(), sampling))
    counts = draw_many(logp, sampling).bincount(minlength=20)
    assert counts[kept == 0].sum() == 0
    expected = (kept / kept.sum())[kept > 0] * counts.sum()
    assert chi_square(counts[kept > 0].numpy(), expected.numpy()) < 4.0


def brute_force_keep(probs: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Walk down the tokens, most probable first and lowest id first among equals."""
    kept = np.zeros(len(probs))
    mass = 0.0
    for rank, token in enumerate(sorted(range(len(probs)), key=lambda i: (-probs[i], i))):
        within_k = sampling.top_k == 0 or rank < sampling.top_k
        within_p = sampling.top_p == 1 or mass < sampling.top_p
        if within_k and within_p and probs[token] >= np.float32(sampling.min_p) * probs.max():
            kept[token] = probs[token]
        mass += float(probs[token])
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 200])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_filters_equal_a_walk_down_the_tokens(top_p: float, top_k: int, min_p: float) -> None:
    sampling = Sampling(top_p=top_p, top_k=top_k, min_p=min_p)
    for logits in (law(2, rows=30), law(3, rows=30).mul(2).round()):
        probs = logits.softmax(-1)
        kept = keep(probs, sampling)
        assert (kept > 0).any(1).all()
        for row, expected in zip(kept, probs.numpy()):
            assert np.array_equal(row.numpy(), brute_force_keep(expected, sampling))


@pytest.mark.parametrize(
    ("sampling", "ids"),
    [
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_p=0.25), [1]),
        (Sampling(top_p=0.5), [1, 3]),
        (Sampling(top_p=0.51), [0, 1, 3]),
        (Sampling(min_p=0.5), [0, 1, 2, 3, 4]),
        (Sampling(min_p=0.51), [1, 3]),
    ],
    ids=str,
)
def test_ties_are_kept_in_id_order(sampling: Sampling, ids: list[int]) -> None:
    probs = torch.tensor([[0.125, 0.25, 0.125, 0.25, 0.125, 0.0625, 0.0625]])
    assert keep(probs, sampling)[0].nonzero()[:, 0].tolist() == ids


def test_temperature_zero_takes_the_lowest_of_the_most_probable() -> None:
    logp = torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.25, 0.25, 0.25, 0.25]]).log()
    uniform = torch.tensor([0.9, 0.9], dtype=torch.float64)
    assert sample(logp, uniform, Sampling(temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize("zeros", [(), (0,), (7,), (0, 1, 6, 7), (3,), (0, 1, 2, 4, 5, 6, 7)])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, LARGEST_UNIFORM])
def test_a_token_of_probability_zero_is_never_drawn(zeros: tuple[int, ...], uniform: float) -> None:
    logits = law(4, rows=50, size=8)
    logits[:, zeros] = -torch.inf
    token = sample(logits.log_softmax(-1), torch.full((50,), uniform, dtype=torch.float64), Sampling())
    assert not set(token.tolist()) & set(zeros)
    possible = [i for i in range(8) if i not in zeros]
    if uniform == 0.0:
        assert set(token.tolist()) == {possible[0]}
    if uniform == LARGEST_UNIFORM:
        assert set(token.tolist()) == {possible[-1]}


@pytest.mark.parametrize("total", [1.0, 1 + 2.0**-52, 1.5, 2 - 2.0**-52, 2.0, 0.5 + 2.0**-53, 1e-300])
def test_the_largest_uniform_stays_below_any_total(total: float) -> None:
    """What keeps the threshold below the last cumulative probability, whatever it rounds to."""
    assert LARGEST_UNIFORM * total < total


def test_equal_uniforms_split_at_the_cumulative_probability() -> None:
    logp = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(5, -1)
    below = np.nextafter(0.25, 0)
    uniform = torch.tensor([0.0, below, 0.25, 0.75, LARGEST_UNIFORM], dtype=torch.float64)
    assert sample(logp, uniform, Sampling()).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9, top_k=3, min_p=0.1)], ids=str)
def test_a_row_of_nan_gives_a_valid_token_and_leaves_the_others_alone(sampling: Sampling) -> None:
    logp = law(5, rows=3)
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = sample(logp, uniform, sampling)
    logp[1] = torch.nan
    token = sample(logp, uniform, sampling)
    assert 0 <= int(token[1]) < 20
    assert torch.equal(token[[0, 2]], expected[[0, 2]])
