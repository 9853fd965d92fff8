"""Both implementations of an operation, for tests that hold for either."""

import importlib
from types import ModuleType

import pytest


def twin(operation: str) -> ModuleType:
    pytest.importorskip("triton", reason="the Triton kernels need Triton, which there is for Linux only")
    return importlib.import_module(f"troll_kernels.{operation}.twin")


def reference(operation: str) -> ModuleType:
    return importlib.import_module(f"troll_kernels.{operation}.ref")


both = pytest.mark.parametrize("implementation", [reference, twin], ids=["reference", "twin"])
