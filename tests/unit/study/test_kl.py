"""Estimators of the KL on a pool: values against independent sums, bias, spread and residuals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from megatron_troll.study import kl_report
from megatron_troll.study.kl import (
    TokenPool,
    estimate,
    estimators,
    expectation,
    qualities,
    residuals,
    seconds,
)

V, RESPONSES, LENGTH = 12, 300, 4


def pool(distance: float = 0.5, seed: int = 0) -> TokenPool:
    """Responses of LENGTH tokens drawn from random rows; the reference is `distance` away in every logit."""
    generator = torch.Generator().manual_seed(seed)
    policy = 2 * torch.randn(RESPONSES * LENGTH, V, generator=generator)
    reference = policy + distance * torch.randn(policy.shape, generator=generator)
    target = torch.multinomial(policy.softmax(1), 1, generator=generator)[:, 0]
    return TokenPool(policy, reference, target, torch.arange(RESPONSES).repeat_interleave(LENGTH))


def rows(pool: TokenPool) -> tuple[Tensor, Tensor]:
    return pool.policy.double().log_softmax(1), pool.reference.double().log_softmax(1)


def test_exact_and_truncated_values_are_plain_sums() -> None:
    here = pool()
    logp, reference = rows(here)
    terms = logp.exp() * (logp - reference)
    first = logp.argsort(1, descending=True)[:, :3]
    by_hand = {"exact": terms.sum(1), "tike 3": terms.gather(1, first).sum(1)}
    for name, value in by_hand.items():
        found = estimate(estimators([3])[name], here).value.double()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)


def test_tike_over_the_whole_vocabulary_is_exact() -> None:
    here = pool()
    found = {name: estimate(method, here).value for name, method in estimators([V]).items()}
    torch.testing.assert_close(found[f"tike {V}"], found["exact"])


@pytest.mark.parametrize(("name", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_the_expectation_is_over_the_tokens_of_a_position(name: str, unbiased: bool) -> None:
    here, method = pool(), estimators([])[name]
    by_hand = torch.zeros(len(here.target), dtype=torch.float64)
    for token in range(V):
        drawn = TokenPool(here.policy, here.reference, torch.full_like(here.target, token), here.response)
        by_hand += rows(here)[0][:, token].exp() * estimate(method, drawn).value.double()
    torch.testing.assert_close(expectation(method, here), by_hand, rtol=1e-4, atol=1e-6)
    exact = expectation(estimators([])["exact"], here).double()
    assert bool(((by_hand - exact).abs() < 1e-4).all()) == unbiased


def test_limits_bias_k3_where_the_policy_has_left_tokens_that_the_reference_keeps() -> None:
    here = pool()
    here.policy[:, 0] -= 12.0
    means = {name: float(expectation(method, here).mean()) for name, method in estimators([]).items()}
    assert means["k3 without limits"] == pytest.approx(means["exact"], rel=1e-3)
    assert means["k3"] < 0.9 * means["exact"]


def test_bias_and_spread_are_those_of_means_over_responses() -> None:
    here = pool()
    known = estimators([2])
    values = {name: estimate(method, here).value for name, method in known.items()}
    expected = {name: expectation(method, here) for name, method in known.items()}
    found = qualities(values, expected, here.response, sizes=(10, 1000))
    assert found["exact"].bias == found["exact"].standard_error == 0
    assert abs(found["k1"].bias) < 4 * found["k1"].standard_error
    assert found["k2"].expected == pytest.approx(float((expected["k2"] - values["exact"]).mean()), rel=1e-6)
    of_response = values["k1"].view(RESPONSES, LENGTH).mean(1).double().numpy()
    for size, spread in zip((10, 1000), found["k1"].spread):
        assert spread == pytest.approx(of_response.std() / np.sqrt(size), rel=0.1)
    assert found["k1"].negative[0] > found["k3"].negative[0] == 0
    assert found["k1"].spread[0] > 2 * found["exact"].spread[0]


def test_residuals_add_up_to_the_bias() -> None:
    here = pool()
    exact, term = (estimate(estimators([2])[name], here) for name in ("exact", "tike 2"))
    found = residuals(2, term, exact.value)
    assert sum(row.share for row in found) == pytest.approx(1)
    whole = sum(row.share * row.mean for row in found)
    assert whole == pytest.approx(float((exact.value - term.value).mean()), abs=1e-6)
    assert [row.low for row in found] == sorted(row.low for row in found)


def test_differentiating_takes_time() -> None:
    assert seconds(estimators([])["exact"], pool(), repeats=1) > 0


def test_the_page_its_figures_and_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_report, "COST_VOCAB", 400)
    output = tmp_path / "kl.md"
    kl_report.write(kl_report.analyse(pool(), [2, 8, 64]), output, "mtroll study kl pool.yaml", "2026-01-02")
    page = output.read_text()
    assert "A pool of 300 responses, 1,200 tokens over 12 token ids" in page
    assert "\n| tike 8 | " in page
    assert "tike 64 | +" not in page
    assert '"tokens": 1200' in output.with_suffix(".json").read_text()
    assert imread(tmp_path / "images" / "kl.png").std() > 0.05
