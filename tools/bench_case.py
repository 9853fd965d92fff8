"""The inputs of bench_head.py, and what it compares: ways from hidden states to a loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_troll.objectives.objective import Objective


@dataclass(frozen=True)
class Shape:
    """N tokens of answers of `answer` tokens each, through a head [vocab, hidden]; TROLL keeps k."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    k: int = 64
    answer: int = 256


@dataclass(frozen=True)
class Case:
    """hidden [N, h] and weight [V, h] with gradients; old [N, h] what the old policy had; target [N] drawn
    from it; advantage [N], one number for each answer."""

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

        # Logits with a standard deviation near 3: entropies like those of a language model.
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
        """The same numbers in another dtype, as leaves."""
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
    """[N] one token of each row's law, from rows in chunks."""
    laws = ((part @ weight.t()).softmax(1) for part in hidden.split(256))
    return torch.cat([law.multinomial(1, generator=generator)[:, 0] for law in laws])


@dataclass(frozen=True)
class Work:
    """The least that a variant must do: matrix products of N x h x V; times that N x V numbers are read or
    written; times that a row [h] is read for each kept token."""

    products: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Variant:
    """One way to the loss of `objective`. `prepare` runs before the clock and returns the forward; `missing`
    says why it cannot run on a device with a dtype, or nothing. `clips`: whether it is PPO-clip on the full
    softmax, against which the others are compared."""

    name: str
    objective: Objective
    work: Work
    prepare: Callable[[Case, Shape], Callable[[], Tensor]]
    missing: Callable[[str, torch.dtype], str | None] = lambda device, dtype: None
    clips: bool = False
