"""Both implementations of an operation, for tests that hold for either."""

import importlib
import sys
from types import ModuleType

import pytest


def kernel(operation: str) -> ModuleType:
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux only")
    return importlib.import_module(f"troll_kernels.{operation}.triton_kernel")


def reference(operation: str) -> ModuleType:
    return importlib.import_module(f"troll_kernels.{operation}.ref")


both = pytest.mark.parametrize("implementation", [reference, kernel], ids=["reference", "kernel"])
