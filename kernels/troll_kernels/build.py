"""The compiled forms in which each Triton kernel is shipped, for ahead-of-time checks without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Triton types of weights, hidden states and logits, by dtype.
DTYPES = {"bf16": "*bf16", "fp32": "*fp32"}
# An integer argument that is a multiple of 16, such as a stride or a hidden size: this allows loads of 128
# bits from a row.
ALIGNED = "i32:16"


@dataclass(frozen=True)
class Build:
    """One compiled form of a kernel.

    arguments   name -> Triton type of a run-time argument ("*fp32", "i32", ALIGNED), without the constants
    constants   name -> value of a compile-time argument
    streams     whether the kernel reads rows of memory, and so must use 128-bit loads
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, int | bool]
    warps: int
    streams: bool
