"""Pairs of sparse policies to project, from a seed."""

import torch
from torch import Tensor

VOCAB = 151_936
P_D = 1e-12


def supports(rows: int, width: int, shared: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Old and new ids [rows, width]: the same tensor, or two that overlap by about half."""
    order = torch.argsort(torch.rand(rows, 2 * width, generator=generator), dim=1)
    old = order[:, :width]
    if shared:
        return old, old
    return old, torch.argsort(torch.rand(rows, 2 * width, generator=generator), dim=1)[:, :width]


def logits(rows: int, width: int, spread: float, generator: torch.Generator) -> Tensor:
    """[rows, width] float64, descending: a head and a tail, as a language model has."""
    return (spread * torch.randn(rows, width, generator=generator, dtype=torch.float64)).sort(
        1, descending=True
    )[0]


def counts(rows: int, width: int) -> Tensor:
    return torch.full((rows,), width)
