"""Checks of the values of weights: numbers that are not finite, codes without scales, values out of range."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_troll.config import ConfigError

# Trained weights have far more than the 4 significant bits of FP8, and a matrix of whole numbers is no matrix
# of weights. Both are found by a few thousand values; FP8 without scales would also need large values.
SAMPLE = 4096
FEWEST, FEWEST_VALUES = 128, 8
LARGEST_WEIGHT, LARGEST_INTEGER = 4.0, 255
CODES = {"FP8": torch.float8_e4m3fn, "FP8 (E5M2)": torch.float8_e5m2}


def check_values(tensor: Tensor, name: str, file: Path) -> None:
    """Raise ConfigError naming tensor and file if a weight is not finite, or if a matrix holds codes of a
    quantised format. Reads floating tensors only; 7 GiB/s on one core."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.itemsize < 2:
        return
    low, high = check_finite(tensor, name, file)
    if tensor.dim() > 1 and (kind := codes_in(tensor, max(-low, high))):
        raise ConfigError(
            f"{file}: {name} holds {kind} codes (from {low:g} to {high:g}) as {_short(tensor.dtype)} without "
            "scales: the weights were quantised, and cannot be restored from this folder; use the one that "
            "it was made from"
        )


def check_finite(tensor: Tensor, name: str, file: Path) -> tuple[float, float]:
    """The lowest and the highest value of a tensor. Raises ConfigError naming tensor and file if some value
    is not finite."""
    low, high = (float(bound) for bound in tensor.aminmax())
    if low - low == 0 and high - high == 0:
        return low, high
    count = int((~tensor.isfinite()).sum())
    raise ConfigError(
        f"{file}: {count} of the {tensor.numel()} values of {name} are not finite (NaN or infinite): the "
        "file is damaged, or the run that wrote it had diverged"
    )


def codes_in(tensor: Tensor, largest: float) -> str | None:
    """The quantised format whose codes all values of a matrix are, by their range and spacing; None if they
    are weights. `largest`: the largest absolute value."""
    whole = tensor.reshape(-1)
    if whole.numel() < FEWEST:
        return None
    sample = whole[:SAMPLE].float()
    if sample.unique().numel() < FEWEST_VALUES or not _codes(sample, largest):
        return None
    return _codes(whole.float(), largest)


def _codes(values: Tensor, largest: float) -> str | None:
    if LARGEST_WEIGHT <= largest <= LARGEST_INTEGER and bool((values * 2 == (values * 2).round()).all()):
        return "integer" if bool((values == values.round()).all()) else "FP4"
    if largest > LARGEST_WEIGHT:
        for kind, dtype in CODES.items():
            if largest <= torch.finfo(dtype).max and bool((values.to(dtype).float() == values).all()):
                return kind
    return None


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`. Raises ConfigError naming it if values are out of range there."""
    result = tensor.to(dtype)
    if result.dtype == tensor.dtype or not result.numel():
        return result
    low, high = (float(bound) for bound in result.aminmax())
    if low - low == 0 and high - high == 0:
        return result
    count, largest = int((~result.isfinite()).sum()), float(tensor.abs().max())
    raise ConfigError(
        f"{name}: {count} of {tensor.numel()} values do not fit into {_short(dtype)}, which ends at "
        f"{torch.finfo(dtype).max:g} (the largest is {largest:g}): choose another --dtype"
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
