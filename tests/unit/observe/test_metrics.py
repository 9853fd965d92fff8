"""Reductions of per-token diagnostics equal numpy's over all tokens, however they are split."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_troll.observe import metrics
from megatron_troll.observe.metrics import Reducer
from megatron_troll.parallel.groups import ALONE, Group
from tests.dist.harness import RankPool

TABLE = {"kl": ("mean", "max", "p50", "p99"), "ratio": ("min", "sum")}


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count))


def quantile(values: torch.Tensor, q: float) -> float:
    return float(np.quantile(values.numpy(), q, method="inverted_cdf"))


def expected(values: torch.Tensor) -> dict[str, float]:
    exact = values.double()
    return {
        "kl": float(exact.mean()),
        "kl/max": float(exact.max()),
        "kl/p50": quantile(values, 0.5),
        "kl/p99": quantile(values, 0.99),
        "ratio/min": float(exact.min()),
        "ratio/sum": float(exact.sum()),
    }


@pytest.mark.parametrize("sizes", [(1000,), (1, 999), (300, 0, 700)])
def test_micro_batches_make_one_step(sizes: tuple[int, ...]) -> None:
    values = tokens(1000)
    reducer = Reducer(TABLE, ALONE)
    for part in values.split(sizes):
        reducer.add({"kl": part, "ratio": part})
    assert reducer.result() == pytest.approx(expected(values), rel=1e-12)


def test_masked_tokens_are_left_out() -> None:
    values = tokens(100)
    keep = torch.arange(100) % 3 == 0
    reducer = Reducer(TABLE, ALONE)
    reducer.add({"kl": values, "ratio": values}, keep)
    assert reducer.result() == pytest.approx(expected(values[keep]), rel=1e-12)


def test_a_diagnostic_without_tokens_is_absent_and_each_step_starts_anew() -> None:
    reducer = Reducer(TABLE, ALONE)
    reducer.add({"kl": tokens(3), "ratio": torch.empty(0)})
    assert set(reducer.result()) == {"kl", "kl/max", "kl/p50", "kl/p99"}
    assert reducer.result() == {}


def test_a_nan_entry_is_a_token_without_that_value() -> None:
    reducer = Reducer(TABLE, ALONE)
    reducer.add({"kl": torch.tensor([1.0, math.nan, 4.0]), "ratio": torch.tensor([math.nan])})
    assert reducer.result() == {"kl": 2.5, "kl/max": 4.0, "kl/p50": 1.0, "kl/p99": 4.0}


def test_quantiles_of_many_tokens_come_from_every_nth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "QUANTILE_SAMPLES", 100)
    values = tokens(250)
    reducer = Reducer(TABLE, ALONE)
    reducer.add({"kl": values})
    result = reducer.result()
    assert result["kl/p50"] == quantile(values[::3], 0.5)
    assert result["kl/max"] == float(values.max())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"kl: unknown \['p95'\]"):
        Reducer({"kl": ("p95",)}, ALONE)
    with pytest.raises(ValueError, match="tau"):
        Reducer(TABLE, ALONE).add({"tau": tokens(1)})


def reduce_share(sizes: tuple[int, ...]) -> dict[str, float]:
    """This rank's share of the tokens, reduced over all ranks."""
    rank = dist.get_rank()
    part = tokens(sum(sizes)).split(sizes)[rank]
    reducer = Reducer(TABLE, Group(dist.group.WORLD, rank, len(sizes)))
    reducer.add({"kl": part, "ratio": part})
    return reducer.result()


@pytest.fixture(scope="module")
def pair():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize("sizes", [(700, 300), (1000, 0)])
def test_ranks_make_one_step(pair: RankPool, sizes: tuple[int, ...]) -> None:
    first, second = pair.run(reduce_share, sizes)
    assert first == second
    assert first == pytest.approx(expected(tokens(1000)), rel=1e-12)
