"""The patches under which megatron-core runs without CUDA: exactly these, and none where CUDA exists."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from megatron_troll.config import Layout
from megatron_troll.mcore.cpu import patches
from megatron_troll.mcore.parallel import start
from megatron_troll.mcore.version import pinned
from tests.dist.harness import RankPool

PINNED = (
    "torch.cuda.current_device",
    "torch.zeros",
    "torch.tensor",
    "Tensor.cuda",
    "Tensor.type",
    "torch.cuda.Stream",
    "torch.cuda.current_stream",
    "torch.cuda.synchronize",
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


@pytest.fixture(scope="module")
def fresh() -> Iterator[RankPool]:
    """A process in which nothing has been patched yet."""
    with RankPool(1) as pool:
        yield pool


def test_nothing_is_applied_where_cuda_exists(fresh: RankPool) -> None:
    assert fresh.run(install_with, "torch.cuda.is_available", True) == [((), [])]


def test_another_version_is_refused_before_anything_is_applied(fresh: RankPool) -> None:
    ((error, changed),) = fresh.run(start_with, "0.17.0")
    assert (
        f"megatron-core 0.17.0 is installed, and this version of megatron-troll runs on {pinned()}" in error
    )
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


def install_with(name: str, value: object) -> tuple[tuple[str, ...], list[str]]:
    """What `install` returns while the function `name` returns `value`; and what it changed."""
    before = attributes()
    with patch(name, lambda: value):
        patches.install.cache_clear()
        returned = patches.install()
    patches.install.cache_clear()
    return returned, changed_since(before)


def start_with(installed: str) -> tuple[str, list[str]]:
    """What `start` raises where megatron-core `installed` is found; and what it changed."""
    before = attributes()
    with (
        patch("megatron_troll.mcore.version.version", lambda name: installed),
        pytest.raises(ValueError, match="megatron-core") as caught,
    ):
        start(Layout(), seed=0)
    return str(caught.value), changed_since(before)


def install_twice() -> tuple[tuple[tuple[str, ...], tuple[str, ...]], list[str]]:
    before = attributes()
    return (patches.install(), patches.install()), changed_since(before)


def attributes() -> dict[str, object]:
    """What the patched names are bound to now."""
    return {each.name: getattr(each.owner, each.attribute, ABSENT) for each in patches.patches()}


def changed_since(before: dict[str, object]) -> list[str]:
    return [name for name, now in attributes().items() if now is not before[name]]
