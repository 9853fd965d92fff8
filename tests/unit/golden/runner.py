"""What a runner of one golden file declares, and how its fields are compared (golden/README.md)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

TEXT = frozenset({"name", "note", "expect_error"})


@dataclass(frozen=True)
class Runner:
    """run: case and dtype -> every output field of the case, by name (lists of dicts where the case has
    them). Fields outside `inputs` must all be there. `gradients` have their own float32 tolerance;
    `float64_only` fields are not determined in float32."""

    run: Callable[[Mapping[str, Any], torch.dtype], Mapping[str, Any]]
    inputs: frozenset[str]
    gradients: frozenset[str] = frozenset()
    float64_only: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tolerance:
    absolute: float
    relative: float

    def allows(self, mine: float, golden: float) -> bool:
        if math.isinf(golden) or math.isnan(golden):
            return str(mine) == str(golden)
        return abs(mine - golden) <= self.absolute + self.relative * abs(golden)


def differences(runner: Runner, case: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, list[str]]:
    """How many numbers were compared, and a line for each that differs."""
    mine = runner.run(case, dtype)
    return _compare_fields(runner, mine, case, dtype, "")


def _compare_fields(
    runner: Runner, mine: Mapping[str, Any], golden: Mapping[str, Any], dtype: torch.dtype, at: str
) -> tuple[int, list[str]]:
    compared, lines = 0, []
    for name in golden.keys() - runner.inputs - TEXT:
        if dtype == torch.float32 and name in runner.float64_only:
            continue
        if name not in mine:
            lines.append(f"{at}{name}: not computed")
            continue
        tolerance = _tolerance(dtype, name in runner.gradients)
        count, found = _compare(runner, mine[name], golden[name], dtype, tolerance, f"{at}{name}")
        compared += count
        lines += found
    return compared, lines


def _compare(
    runner: Runner, mine: Any, golden: Any, dtype: torch.dtype, tolerance: Tolerance, at: str
) -> tuple[int, list[str]]:
    if isinstance(golden, dict):
        return _compare_fields(runner, mine, golden, dtype, f"{at}.")
    if isinstance(golden, list):
        if len(mine) != len(golden):
            return 1, [f"{at}: {len(mine)} entries, golden {len(golden)}"]
        parts = [
            _compare(runner, a, b, dtype, tolerance, f"{at}[{i}]")
            for i, (a, b) in enumerate(zip(mine, golden))
        ]
        return 1 + sum(count for count, _ in parts), [line for _, found in parts for line in found]
    if golden is None or mine is None:
        return 1, [] if golden is mine else [f"{at}: {mine}, golden {golden}"]
    exact = isinstance(golden, bool) or isinstance(mine, bool | int)
    same = int(mine) == int(golden) if exact else tolerance.allows(float(mine), float(golden))
    return 1, [] if same else [f"{at}: {mine}, golden {golden}"]


def _tolerance(dtype: torch.dtype, gradient: bool) -> Tolerance:
    if dtype == torch.float64:
        return Tolerance(1e-12, 1e-9)
    return Tolerance(2e-6, 2e-4 if gradient else 2e-5)
