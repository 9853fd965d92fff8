import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.objectives.divergence import Divergence, binary, topk

V = 7


def full(kind: Divergence, mu: Tensor, pi: Tensor) -> Tensor:
    return topk(mu, pi, torch.ones_like(mu, dtype=torch.bool), V, kind)


def test_by_hand():
    """mu = (.5, .3, .2), pi = (.25, .3, .45); the first token was drawn, one is kept."""
    mu, pi = torch.tensor([[0.5, 0.3, 0.2]]).double().log(), torch.tensor([[0.25, 0.3, 0.45]]).double().log()
    kl = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    assert binary(mu[:, 0], pi[:, 0], "binary_tv").item() == pytest.approx(0.25)
    assert binary(mu[:, 0], pi[:, 0], "binary_kl").item() == pytest.approx(kl.item())
    two = torch.tensor([[True, False, True]])
    assert topk(mu, pi, two, 3, "topk_tv").item() == pytest.approx(0.25)
    expected = 0.5 * torch.tensor(2.0).log() + 0.2 * torch.tensor(0.2 / 0.45).log()
    assert topk(mu, pi, two, 3, "topk_kl").item() == pytest.approx(expected.item())


def rounding(mu: Tensor, pi: Tensor, kept: Tensor) -> Tensor:
    """[N] What the KL of the rest may be off by: each rest is 1 less a sum of V numbers, right to V machine
    epsilons, and d/dpi of mu log(mu / pi) is -mu / pi."""
    mu_rest, pi_rest = (logp.exp().masked_fill(kept, 0.0).sum(1) for logp in (mu, pi))
    return V * torch.finfo(torch.float64).eps * (mu_rest / pi_rest).nan_to_num(0.0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, V), st.floats(0.0, 3.0))
@example(29, 6, 2.720703125)
def test_merging_categories_only_loses(seed, k, change):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, V, generator=generator, dtype=torch.float64)
    mu = logits.log_softmax(1)
    pi = (logits + change * torch.randn(4, V, generator=generator, dtype=torch.float64)).log_softmax(1)
    kept = torch.zeros(4, V, dtype=torch.bool).scatter(1, mu.topk(k).indices, True)
    kept[:, 0] = True
    pairs: list[tuple[Divergence, Divergence]] = [("binary_tv", "topk_tv"), ("binary_kl", "topk_kl")]
    for one, some in pairs:
        coarse, middle = binary(mu[:, 0], pi[:, 0], one), topk(mu, pi, kept, V, some)
        assert (coarse <= middle + 1e-12 + rounding(mu, pi, kept)).all()
        assert (middle <= full(some, mu, pi) + 1e-12 + rounding(mu, pi, kept)).all()
        assert (binary(mu[:, 0], mu[:, 0], one) == 0).all()
    assert (full("topk_tv", mu, pi) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(dtype):
    """Certain tokens and forbidden ones."""
    log_mu, log_pi = torch.tensor([[0.0, -torch.inf]], dtype=dtype), torch.tensor([[-1.0, -0.5]], dtype=dtype)
    kept = torch.tensor([[True, True]])
    assert topk(log_mu, log_pi, kept, 9, "topk_kl").item() == pytest.approx(1.0)
    assert topk(log_pi, log_mu, kept, 9, "topk_kl").item() == torch.inf
    assert binary(log_mu[:, 0], log_mu[:, 0], "binary_kl").item() == 0
    assert topk(log_mu, log_pi, kept, 9, "topk_tv").dtype == dtype
