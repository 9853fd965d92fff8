"""Muon and AdamW in float64 on the tensors of a published folder, without any layout."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tests.dist.tiny import NEXT

Weights = dict[str, Tensor]
# Jordan's iteration with the coefficients that its author's record runs use, one triple a step.
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
NO_MATRIX = (
    "embed_tokens",
    "lm_head",
    "norm.weight",
    "conv1d",
    "A_log",
    "dt_bias",
    "shared_expert_gate",
    ".bias",
    "act_fn.",
)


class Dense:
    """Both optimizers after any number of steps, from weights of zero: `weights` is what they made."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.weights = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        self._first = {name: weight.clone() for name, weight in self.weights.items()}
        self._second = {name: weight.clone() for name, weight in self.weights.items()}
        self._steps = 0

    def step(self, gradients: Weights, limit: float) -> float:
        """Take one step from gradients clipped to a norm of `limit`; returns their norm."""
        self._steps += 1
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        for name, gradient in gradients.items():
            clipped = gradient.double() * min(1.0, limit / (norm + 1e-6))
            update = self._muon if is_matrix(name) else self._adamw
            # Neither optimizer decays vectors.
            decay = self.weight_decay if gradient.dim() > 1 and "norm" not in name else 0.0
            weight = self.weights[name]
            weight.mul_(1 - self.lr * decay).sub_(self.lr * update(name, clipped))
        return norm

    def _muon(self, name: str, gradient: Tensor) -> Tensor:
        mean = self._first[name].mul_(0.95).add_(0.05 * gradient)
        return each_matrix(name, 0.05 * gradient + 0.95 * mean, orthogonalized)

    def _adamw(self, name: str, gradient: Tensor) -> Tensor:
        first = self._first[name].mul_(0.9).add_(0.1 * gradient)
        second = self._second[name].mul_(0.99).add_(0.01 * gradient.square())
        corrected = (second / (1 - 0.99**self._steps)).sqrt()
        return first / (1 - 0.9**self._steps) / (corrected + 1e-8)


def is_matrix(name: str) -> bool:
    return not any(part in name for part in NO_MATRIX)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The update of one matrix, as large as AdamW's."""
    x = matrix / matrix.norm()
    for a, b, c in QUINTIC:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return 0.2 * max(matrix.shape) ** 0.5 * x


def each_matrix(name: str, weight: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """`act` on every matrix that a published tensor of Qwen3-Next holds interleaved by heads, or on all."""
    keys, values = NEXT["linear_num_key_heads"], NEXT["linear_num_value_heads"]
    key, value = NEXT["linear_key_head_dim"], values // keys * NEXT["linear_value_head_dim"]
    if "in_proj_qkvz" in name:
        return _interleaved(weight, keys, (key, key, value, value), act)
    if "in_proj_ba" in name:
        return _interleaved(weight, keys, (values // keys, values // keys), act)
    if "q_proj" in name and weight.shape[0] == 2 * NEXT["num_attention_heads"] * NEXT["head_dim"]:
        return _interleaved(weight, NEXT["num_attention_heads"], (NEXT["head_dim"],) * 2, act)
    return act(weight)


def _interleaved(weight: Tensor, groups: int, rows: Iterable[int], act: Callable[[Tensor], Tensor]) -> Tensor:
    parts = weight.unflatten(0, (groups, -1)).split(list(rows), 1)
    acted = [act(part.flatten(0, 1)).view_as(part) for part in parts]
    return torch.cat(acted, 1).flatten(0, 1)
