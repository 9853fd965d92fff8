import torch
from troll_kernels.transform import Transform

INF = float("inf")


def test_the_cap_comes_before_the_temperature():
    x = torch.tensor([-50.0, -1.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    assert torch.allclose(Transform(2.0, cap=10.0).apply(x), 10.0 * (x / 10.0).tanh() / 2.0)
    assert torch.equal(Transform(2.0).apply(x), x / 2.0)


def test_a_token_ruled_out_stays_ruled_out():
    x = torch.tensor([-INF, 1.0], requires_grad=True)
    y = Transform(1.0, cap=5.0).apply(x)
    assert y[0] == -INF
    y[1].backward()
    assert x.grad is not None
    assert x.grad[0] == 0.0


def test_slope_is_the_derivative():
    x = torch.linspace(-20.0, 20.0, 9, dtype=torch.float64, requires_grad=True)
    for transform in (Transform(0.5), Transform(0.5, cap=3.0)):
        y = transform.apply(x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(torch.zeros_like(x) + transform.slope(y.detach()), expected, atol=1e-12)
