"""xIELU against transformers' in float64, and in bf16 against its definition in fp32."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2CLS

from megatron_troll.mcore.xielu import XIELU

SCALARS = {"alpha_p": 0.3, "alpha_n": -0.7, "beta": 0.6, "eps": -0.2}


def made(dtype: torch.dtype, sequence_parallel: bool = False) -> XIELU:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)
    ours = XIELU(config)
    for name, value in SCALARS.items():
        ours.get_parameter(name).data.fill_(value)
    return ours


def inputs(dtype: torch.dtype) -> Tensor:
    """[40, 3, 7], also where a rounded exponential would lose everything, and between eps and 0."""
    x = torch.randn(40, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0], x[1], x[2, 0, 0] = -1e-7, -0.1, 0.0
    return x.to(dtype).requires_grad_()


def test_values_and_gradients_are_those_of_transformers() -> None:
    ours, theirs = made(torch.float64), ACT2CLS["xielu"](dtype=torch.float64)
    for name, value in SCALARS.items():
        getattr(theirs, name).data.fill_(value)
    x, grad = inputs(torch.float64), torch.randn(40, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad((act(x) * grad).sum(), (x, act.alpha_p, act.alpha_n)) for act in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_in_bf16_only_scalars_and_result_are_rounded() -> None:
    act, x = made(torch.bfloat16), inputs(torch.bfloat16)
    p, n = F.softplus(act.alpha_p).float(), (act.beta + F.softplus(act.alpha_n)).float()
    wide = x.float()
    below = n * (torch.expm1(wide.minimum(act.eps.float())) - wide)
    exact = torch.where(wide > 0, p * wide * wide, below) + act.beta.float() * wide
    torch.testing.assert_close(act(x), exact.bfloat16(), rtol=2**-8, atol=0)


def test_it_keeps_its_input_alone() -> None:
    saved: list[Tensor] = []
    x = inputs(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        made(torch.float32)(x)
    assert [tuple(tensor.shape) for tensor in saved if tensor.numel() > 1] == [tuple(x.shape)]


def test_what_is_learned_is_told() -> None:
    for name, parameter in made(torch.float32, sequence_parallel=True).named_parameters():
        assert parameter.requires_grad == name.startswith("alpha")
        assert getattr(parameter, "sequence_parallel", False)  # Megatron sums its gradients over the ranks
