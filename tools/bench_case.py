"""The inputs of bench_head.py, and the variants it compares: ways to compute a loss from hidden states."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_troll.objectives.objective import Objective


@dataclass(frozen=True)
class Shape:
    """N tokens in answers of `answer` tokens each, through a head [vocab, hidden]; TROLL keeps k logits."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    k: int = 64
    answer: int = 256


@dataclass(frozen=True)
class Case:
    """hidden [N, h] and weight [V, h] with gradients; old [N, h] the old policy's hidden states; target [N]
    sampled from the old policy; advantage [N], one number per answer."""

    hidden: Tensor
    old: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor

    @staticmethod
    def of(shape: Shape, device: str) -> "Case":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        # Logits with a standard deviation near 3 give entropies like those of a language model.
        weight = normal(shape.vocab, shape.hidden, scale=3.0 / shape.hidden**0.5)
        old = normal(shape.tokens, shape.hidden, scale=1.0)
        hidden = old + normal(shape.tokens, shape.hidden, scale=0.05)
        advantage = normal(shape.tokens // shape.answer, scale=1.0)
        return Case(
            hidden.to(shape.dtype).requires_grad_(),
            old.to(shape.dtype),
            weight.to(shape.dtype).requires_grad_(),
            _drawn(old, weight, generator),
            advantage.repeat_interleave(shape.answer),
        )

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another dtype, as autograd leaves."""
        return Case(
            self.hidden.detach().to(dtype).requires_grad_(),
            self.old.to(dtype),
            self.weight.detach().to(dtype).requires_grad_(),
            self.target,
            self.advantage,
        )

    def clear(self) -> None:
        self.hidden.grad = None
        self.weight.grad = None


def _drawn(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """[N] one token sampled from each row's distribution; processes rows in chunks."""
    laws = ((part @ weight.t()).softmax(1) for part in hidden.split(256))
    return torch.cat([law.multinomial(1, generator=generator)[:, 0] for law in laws])


@dataclass(frozen=True)
class Work:
    """The least work of a variant. products: matrix products of N x h x V; rows: times that N x V numbers are
    read or written; columns: times that a row [h] is read or written for each kept token."""

    products: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Variant:
    """One way to compute the loss of `objective`. `prepare` runs untimed and returns the forward; `missing`
    returns why the variant cannot run on a device with a dtype, or None. `clips`: whether it is PPO-clip on
    the full softmax, with which the others are compared."""

    name: str
    objective: Objective
    work: Work
    prepare: Callable[[Case, Shape], Callable[[], Tensor]]
    missing: Callable[[str, torch.dtype], str | None] = lambda device, dtype: None
    clips: bool = False
