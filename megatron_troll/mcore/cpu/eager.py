"""Import megatron.core on a machine without a GPU in less time."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def import_megatron() -> None:
    """Import megatron.core, once; without a GPU, leave the functions that it marks for `torch.compile` as
    they are. To mark one imports the compiler, which takes two seconds on every rank, and to call one would
    start a C++ compiler. Without this call both happen, and results may differ by rounding."""
    if torch.cuda.is_available():
        return
    with mock.patch.object(torch, "compile", _as_it_is):
        import megatron.core  # noqa: F401


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """`torch.compile`, as a function or a decorator with arguments, that changes nothing."""
    return function if function is not None else _as_it_is
