import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from troll_kernels import dispatch
from troll_kernels.topk import ref

from tests.unit.kernels.implementations import kernel


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is elsewhere."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda", 0)


def on_gpu(dtype: torch.dtype = torch.float32) -> OnGpu:
    return torch.zeros(1, 4, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The capability of every GPU, as the only element."""
    value = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: value[0])
    dispatch.supported.cache_clear()
    yield value
    dispatch.supported.cache_clear()


def test_a_supported_gpu_runs_the_kernel(capability):
    assert dispatch._takes_kernel([on_gpu(), on_gpu()])
    assert dispatch._kernel(ref.top_k) is kernel("topk").top_k


def test_float64_runs_the_reference(capability):
    assert not dispatch._takes_kernel([on_gpu(), on_gpu(torch.float64)])


def test_cpu_runs_the_reference():
    assert not dispatch._takes_kernel([torch.zeros(1)])


def test_an_old_gpu_runs_the_reference_and_says_so_once(capability):
    capability[0] = (7, 0)
    with pytest.warns(
        UserWarning, match=r"GPU 0: compute capability \(7, 0\) is below \(8, 0\); the torch ref"
    ):
        assert not dispatch._takes_kernel([on_gpu()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not dispatch._takes_kernel([on_gpu()])


def test_without_triton_the_reference_runs(capability, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not dispatch._takes_kernel([on_gpu()])


def test_the_operation_keeps_the_reference_documentation():
    operation = dispatch.by_device(ref.top_k)
    assert operation.__doc__ == ref.top_k.__doc__
