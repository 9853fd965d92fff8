"""Process groups as values: code that communicates is given the group to use."""

import datetime
import ipaddress
import os
import socket
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# Errors that a rank passes on to the others: failures from outside, and the bases of our own errors. Any
# other error is a bug; its rank ends with a traceback, and the launcher ends the others.
REPORTED = (OSError, RuntimeError, ValueError)
# Bytes of an array that are one message.
SENT_AT_ONCE = 1 << 30

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Group:
    """A process group, this process's rank in it and its size. handle is None for a group of one, on
    which every operation is the identity. `host`: a gloo group of the same ranks, over which objects, arrays
    and barriers go, so that ranks neither wait in a GPU's kernel nor send through its memory; None: `handle`
    is that."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    host: dist.ProcessGroup | None = None

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `tensor` in place and return it. Blocks until every rank of the group has called it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.handle)
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """One tensor per rank, in rank order; shapes must be equal. Holds `size` copies. Blocks."""
        if self.size == 1:
            return [tensor]
        parts = [tensor.new_empty(tensor.shape) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.handle)
        return parts

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Send the i-th of `size` equal parts along axis 0 to rank i; the i-th part of the result is from
        rank i. Blocks."""
        if self.size == 1:
            return tensor
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor.contiguous(), group=self.handle)
        return received

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send the i-th of `size` parts, of any number of rows, to rank i; returns those from every rank, in
        rank order. Blocks."""
        if self.size == 1:
            return [*parts]
        sizes = [len(part) for part in parts]
        theirs = self.all_to_all(torch.tensor(sizes, device=parts[0].device)).tolist()
        sent = torch.cat([*parts])
        received = sent.new_empty((sum(theirs), *sent.shape[1:]))
        dist.all_to_all_single(received, sent, theirs, sizes, group=self.handle)
        return list(received.split(theirs))

    def all_gather_objects(self, value: Any) -> list[Any]:
        """One small picklable object per rank, in rank order. Blocks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Fill `tensor` in place from the group's rank `source` and return it. Blocks."""
        if self.size > 1:
            assert self.handle is not None
            dist.broadcast(tensor, dist.get_global_rank(self.handle, source), group=self.handle)
        return tensor

    def broadcast_object(self, value: Any, source: int) -> Any:
        """`value` of the group's rank `source`, on every rank. Blocks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self._global(source), group=self._host)
        return box[0]

    def broadcast_arrays(self, arrays: Arrays | None, source: int) -> Arrays:
        """The arrays of the group's rank `source` (others give None), on every rank: first their shapes, then
        the bytes of each, which nothing pickles. Blocks."""
        if self.size == 1:
            assert arrays is not None
            return arrays
        shapes = self.broadcast_object(None if arrays is None else _shapes(arrays), source)
        received = _empty(shapes) if arrays is None else arrays
        for part in _parts(received):
            dist.broadcast(part, self._global(source), group=self._host)
        return received

    def send_arrays(self, arrays: Arrays, to: int) -> None:
        """Send arrays to the group's rank `to`, which must receive them. Blocks."""
        dist.send_object_list([_shapes(arrays)], self._global(to), group=self._host)
        for part in _parts(arrays):
            dist.send(part, self._global(to), group=self._host)

    def receive_arrays(self, source: int) -> Arrays:
        """Receive what the group's rank `source` sends with `send_arrays`. Blocks."""
        box: list[Any] = [None]
        dist.recv_object_list(box, self._global(source), group=self._host)
        received = _empty(box[0])
        for part in _parts(received):
            dist.recv(part, self._global(source), group=self._host)
        return received

    def sum_arrays(self, array: np.ndarray) -> np.ndarray:
        """Sum arrays of one shape over all ranks, in place and in host memory; returns it. Blocks."""
        if self.size > 1:
            dist.all_reduce(torch.from_numpy(array), group=self._host)
        return array

    def each[T](self, act: Callable[[], T]) -> T:
        """Call `act` on every rank; each gets its own result. An error of a type in REPORTED on any rank is
        raised on all ranks; if several ranks fail, that of the lowest rank. Blocks."""
        result, error = None, None
        try:
            result = act()
        except REPORTED as found:
            error = found
        for found in self.all_gather_objects(error):
            if found is not None:
                raise found
        return cast("T", result)

    def first[T](self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0; return its (picklable) result, or raise its error if in REPORTED, on every
        rank. Blocks."""
        return self.broadcast_object(self.each(lambda: act() if self.rank == 0 else None), 0)

    def any(self, flag: Tensor) -> bool:
        """Whether `flag`, one number on the device of the group, is not 0 on some rank. Blocks, and waits for
        the device."""
        return bool(self.all_reduce(flag, dist.ReduceOp.MAX).item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self._host)

    @property
    def _host(self) -> dist.ProcessGroup | None:
        return self.host or self.handle

    def _global(self, rank: int) -> int:
        """The rank in the world of a rank of this group."""
        assert self.handle is not None
        return dist.get_global_rank(self.handle, rank)


def _shapes(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, array.dtype.str) for name, array in arrays.items()}


def _empty(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> Arrays:
    return {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _parts(arrays: Arrays) -> Iterator[Tensor]:
    """The memory of contiguous arrays, as bytes in pieces that gloo sends at once; none of an empty array."""
    for array in arrays.values():
        if array.nbytes:
            yield from torch.from_numpy(array.reshape(-1).view(np.uint8)).split(SENT_AT_ONCE)


ALONE = Group(None, 0, 1)


@dataclass(frozen=True)
class Groups:
    """The groups of one layout. A rank's place in each follows Megatron's order tp-cp-ep-dp-pp.

    dp     ranks that hold the same shards and see different data (context-parallel ranks not included)
    dp_cp  dp x cp: the ranks whose gradients are summed
    model  tp x pp: the ranks that together hold one replica
    state  Megatron's global state while its functions work on this layout (mcore/parallel.py)
    """

    world: Group = ALONE
    tp: Group = ALONE
    pp: Group = ALONE
    cp: Group = ALONE
    dp: Group = ALONE
    dp_cp: Group = ALONE
    ep: Group = ALONE
    etp: Group = ALONE
    model: Group = ALONE
    state: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1


class HostGroups:
    """The gloo groups beside those of another backend, one for each set of ranks."""

    def __init__(self, timeout: datetime.timedelta) -> None:
        self._timeout = timeout
        self._made: dict[Hashable, tuple[dist.ProcessGroup | None, list[dist.ProcessGroup]]] = {}

    def beside(self, handle: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        """A gloo group of the ranks of this rank's `handle`, which all ranks of the world must ask for, each
        for its own; None if `handle` is one itself. Blocks until every rank has."""
        if handle is None or dist.get_backend(handle) == "gloo":
            return None
        if handle == dist.group.WORLD:
            return self._of([list(range(dist.get_world_size()))])
        gathered: list[Any] = [None] * dist.get_world_size()
        world = self._of([list(range(dist.get_world_size()))])
        dist.all_gather_object(gathered, dist.get_process_group_ranks(handle), group=world)
        return self._of(sorted({tuple(ranks) for ranks in gathered}))

    def _of(self, sets: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        key = tuple(tuple(ranks) for ranks in sets)
        if key not in self._made:
            mine, every = dist.new_subgroups_by_enumeration(
                [list(ranks) for ranks in sets], timeout=self._timeout, backend="gloo"
            )
            # In place of a group that it is not in, a rank has a number.
            member = mine if isinstance(mine, dist.ProcessGroup) else None
            self._made[key] = member, [group for group in every if isinstance(group, dist.ProcessGroup)]
        return self._made[key][0]

    def leave(self) -> None:
        """Destroy the groups."""
        for _, every in self._made.values():
            for group in every:
                dist.destroy_process_group(group)
        self._made.clear()


def join_world(backend: str, timeout: datetime.timedelta) -> None:
    """Form the world's process group from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of the environment.
    Blocks until every rank has joined; raises torch.distributed.DistError if that takes longer than
    `timeout`, which limits collectives too."""
    # torchrun's agent holds the store itself.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        store = store_at(address, port, world, timeout)
    else:
        store = dist.TCPStore(address, port, world, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def store_at(host: str, port: int, world: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """Open a store at an address of this machine (port 0: any free one) for `world` processes. Whoever can
    reach a store can write what ranks unpickle, and TCPStore by itself listens on every interface: this one
    listens only at `host`, unless that is a name, which may resolve to another address on this node than on
    the others. Raises OSError."""
    options = {"is_master": True, "timeout": timeout, "wait_for_workers": False}
    if not _is_address(host):
        return dist.TCPStore(host, port, world, **options)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=world)
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, world, master_listen_fd=listener.detach(), **options)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@contextmanager
def joined(timeout: datetime.timedelta) -> Iterator[Group]:
    """Group of the ranks that torchrun or srun started, over gloo, until the block ends; only this process if
    RANK is not set. Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment. Blocks until
    all have joined; raises torch.distributed.DistError if that takes longer than `timeout`, which limits
    collectives too."""
    if "RANK" not in os.environ:
        yield ALONE
        return
    join_world("gloo", timeout)
    try:
        yield Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
