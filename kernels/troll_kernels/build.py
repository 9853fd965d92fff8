"""What of a Triton kernel is shipped: the forms it is compiled in, for ahead-of-time checks without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# dtypes that weights, hidden states and logits come in.
DTYPES = {"bf16": "*bf16", "fp32": "*fp32"}
# An integer that is a multiple of 16, as strides and hidden sizes are: what lets rows load 128 bits at a
# time.
ALIGNED = "i32:16"


@dataclass(frozen=True)
class Build:
    """One compiled form.

    arguments   name -> Triton type of a run-time argument ("*fp32", "i32", ALIGNED), without the constants
    constants   name -> value of a compile-time argument
    streams     whether it reads rows of memory, and so must have 128-bit loads
    """

    label: str
    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, int | bool]
    warps: int
    streams: bool
