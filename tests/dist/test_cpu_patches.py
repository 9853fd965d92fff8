"""The patches under which megatron-core runs without CUDA: exactly these, for exactly this version, and none
where CUDA exists. That each is needed was found by leaving it out of test_layouts.py, test_checkpoint.py and
test_generation.py.
"""

import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from unittest.mock import patch

import pytest
import torch

from megatron_troll.mcore.cpu import patches
from tests.dist.harness import RankPool
from tests.house.markdown import ROOT

PINNED = (
    "torch.cuda.current_device",
    "torch.zeros",
    "torch.tensor",
    "Tensor.cuda",
    "Tensor.type",
    "torch.cuda.Stream",
    "torch.cuda.current_stream",
    "torch.cuda.synchronize",
    "megatron.core.transformer.moe.moe_utils.te_general_gemm",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "torch.distributed.all_gather",
    "ProcessGroupGloo.__init__",
)
ABSENT = object()


def test_the_list_is_pinned() -> None:
    assert tuple(each.name for each in patches.patches()) == PINNED
    assert all(each.reason for each in patches.patches())


def test_the_version_is_the_one_that_is_installed_and_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version("megatron-core") == patches.MCORE_VERSION
    assert f"megatron-core=={patches.MCORE_VERSION}" in project["dependencies"]


@pytest.fixture(scope="module")
def fresh() -> Iterator[RankPool]:
    """A process in which nothing has been patched yet."""
    with RankPool(1) as pool:
        yield pool


def test_nothing_is_applied_where_cuda_exists(fresh: RankPool) -> None:
    assert fresh.run(install_with, "torch.cuda.is_available", True) == [((), [])]


def test_another_version_is_refused_before_anything_is_applied(fresh: RankPool) -> None:
    ((error, changed),) = fresh.run(install_with, "megatron.core.__version__", "0.17.0")
    assert "needs megatron-core 0.16.1, found 0.17.0" in error
    assert changed == []


def test_without_cuda_all_are_applied_once(fresh: RankPool) -> None:
    (((installed, again), changed),) = fresh.run(install_twice)
    assert installed == again == PINNED
    assert set(changed) == set(PINNED)


def test_recomputation_leaves_no_calls_queued_for_cuda(fresh: RankPool) -> None:
    assert fresh.run(calls_queued) == [0]


def calls_queued() -> int:
    from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states

    patches.install()
    before = len(torch.cuda._queued_calls)
    _set_all_rng_states(*_get_all_rng_states())
    return len(torch.cuda._queued_calls) - before


def install_with(name: str, value: object) -> tuple[tuple[str, ...] | str, list[str]]:
    """What `install` returns or raises while `name` is, or returns, `value`; and what it changed."""
    import megatron.core  # noqa: F401 - resolves the name

    before = attributes()
    stand_in = (lambda: value) if isinstance(value, bool) else value
    with patch(name, stand_in):
        patches.install.cache_clear()
        try:
            returned: tuple[str, ...] | str = patches.install()
        except RuntimeError as error:
            returned = str(error)
    patches.install.cache_clear()
    return returned, changed_since(before)


def install_twice() -> tuple[tuple[tuple[str, ...], tuple[str, ...]], list[str]]:
    before = attributes()
    return (patches.install(), patches.install()), changed_since(before)


def attributes() -> dict[str, object]:
    """What the patched names are bound to now."""
    return {each.name: getattr(each.owner, each.attribute, ABSENT) for each in patches.patches()}


def changed_since(before: dict[str, object]) -> list[str]:
    return [name for name, now in attributes().items() if now is not before[name]]
