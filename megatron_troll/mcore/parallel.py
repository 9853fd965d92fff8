"""Start and stop the process groups of a layout; return them as values."""

import datetime
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_troll.config import Layout
from megatron_troll.mcore.cpu import patches
from megatron_troll.mcore.layout import check_world
from megatron_troll.mcore.version import check_version
from megatron_troll.parallel.groups import ALONE, Group, Groups, HostGroups, join_world

# Hangs are detected by the watchdog (observe/hang.py); a rank may wait long for one that makes progress.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=1)


# Megatron's globals for every layout of this world. Each process group has threads until `leave` ends it.
_formed: list[dict[str, Any]] = []
_hosts = HostGroups(COLLECTIVE_TIMEOUT)


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def start(layout: Layout, seed: int) -> Groups:
    """Join the world (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT from the environment), form the groups of
    `layout` and seed this rank. May be called again with another layout. Blocks until every rank has joined.

    Raises ValueError if the layout does not divide the world, or if megatron-core is not the pinned version.
    """
    check_version()
    patches.install()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        join_world(backend, COLLECTIVE_TIMEOUT)
    groups = _form(layout)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # The inference tracker never forks a CUDA generator; our modules use no random numbers in the model.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
    return groups


def also(layout: Layout) -> Groups:
    """Form the groups of a second layout of the same world; the first layout stays the current one. Blocks
    until every rank has called it. Raises ValueError if the layout does not divide the world."""
    current = _state()
    try:
        return _form(layout)
    finally:
        _become(current)


@contextmanager
def inside(groups: Groups) -> Iterator[None]:
    """Make Megatron's functions use the layout of `groups` inside the block."""
    current = _state()
    _become(groups.state)
    try:
        yield
    finally:
        _become(current)


def stop() -> None:
    """Leave the world; without this call gloo complains at exit. Groups still held can no longer be used."""
    leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave() -> None:
    """Destroy the groups of every layout; the world stays."""
    held = {value for state in _formed for value in state.values() if isinstance(value, dist.ProcessGroup)}
    for group in held - {dist.group.WORLD}:
        dist.destroy_process_group(group)
    for state in _formed:
        state.clear()
    _formed.clear()
    _hosts.leave()
    parallel_state.destroy_model_parallel()


def _form(layout: Layout) -> Groups:
    check_world(layout, dist.get_world_size())
    # Not destroy_model_parallel: it would destroy groups that another layout still uses.
    _become(dict.fromkeys(_state()))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=COLLECTIVE_TIMEOUT // datetime.timedelta(minutes=1),
    )
    return _groups()


def _state() -> dict[str, Any]:
    """All module globals in which Megatron keeps its layout."""
    return {name: value for name, value in vars(parallel_state).items() if name[0] == "_" and name.isupper()}


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    _formed.append(state)
    return state


def _become(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(parallel_state, name, value)


def _groups() -> Groups:
    state: Any = parallel_state  # typed by Megatron as anything but groups
    return Groups(
        world=_group(dist.group.WORLD),
        tp=_group(state.get_tensor_model_parallel_group()),
        pp=_group(state.get_pipeline_model_parallel_group()),
        cp=_group(state.get_context_parallel_group()),
        dp=_group(state.get_data_parallel_group()),
        dp_cp=_group(state.get_data_parallel_group(with_context_parallel=True)),
        ep=_group(state.get_expert_model_parallel_group()),
        etp=_group(state.get_expert_tensor_parallel_group()),
        model=_group(state.get_model_parallel_group()),
        state=_kept(_state()),
    )


def _group(handle: dist.ProcessGroup | None) -> Group:
    # All ranks ask, also those that are alone: making groups is a collective of the world.
    host = _hosts.beside(handle)
    if handle is None or handle.size() == 1:
        return ALONE
    return Group(handle, handle.rank(), handle.size(), host)
