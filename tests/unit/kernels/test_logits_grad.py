import pytest
import torch
from troll_kernels.transform import IDENTITY, Transform

from tests.unit.kernels.implementations import both

INF = float("inf")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("transform", [IDENTITY, Transform(0.7), Transform(1.3, cap=4.0)])
@pytest.mark.parametrize(("width", "held"), [(2100, 2112), (17, 17)])
def test_against_autograd(implementation, dtype, with_mean, transform, width, held):
    generator = torch.Generator().manual_seed(0)
    logits = (2.0 * torch.randn(3, held, generator=generator)).to(dtype)
    logits[:, 3::5] = -INF
    lse_grad = torch.randn(3, generator=generator)
    mean_grad = torch.randn(3, generator=generator) if with_mean else None

    raw = logits[:, :width].double().requires_grad_()
    x = transform.apply(raw)
    lse, p = x.logsumexp(1), x.softmax(1)
    mean = (p * x.masked_fill(x == -INF, 0.0)).sum(1)
    loss = (lse * lse_grad).sum() + (0.0 if mean_grad is None else (mean * mean_grad).sum())
    (expected,) = torch.autograd.grad(loss, raw)

    numbers = lse.detach(), mean.detach().float(), lse_grad, mean_grad
    implementation("logits_grad").to_logits_grad(logits, width, *numbers, transform)
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits[:, :width].double(), expected, rtol=tolerance, atol=tolerance / 10)
    assert (logits[:, width:] == 0.0).all()
