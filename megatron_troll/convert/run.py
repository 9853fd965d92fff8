"""Run a conversion: distribute the files over the ranks, skip finished ones, and show progress."""

import datetime
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from megatron_troll.convert.draft import Draft, TargetError
from megatron_troll.convert.plan import Conversion
from megatron_troll.convert.progress import NoProgress
from megatron_troll.mcore.checkpoint_sums import check_folder_sums
from megatron_troll.parallel.groups import Group

# Ranks wait for the one that has the most to write.
TIMEOUT = datetime.timedelta(days=7)


def convert(conversion: Conversion, target: Path, world: Group, progress: NoProgress) -> bool:
    """Write `target`, its shards distributed over the ranks of `world`; False if it exists already. Blocks.

    A finished file is never written again, even after a kill. Raises on every rank TargetError, or SumsError
    if source or finished target differ from their checksums, before anything is written; or ConversionError.
    """
    draft = Draft(target, conversion.identity)
    if world.first(draft.is_complete):
        world.first(draft.tidy)
        world.each(lambda: check_folder_sums(target, conversion.shards, world.rank, world.size))
        return False
    world.each(lambda: conversion.check(world.rank, world.size))
    with ExitStack() as owned:

        def begin() -> None:
            owned.enter_context(draft.open())
            _check_space(draft, conversion)

        world.first(begin)
        world.each(lambda: _write(draft, conversion, world, progress))
        world.first(lambda: _finish(draft, conversion))
    return True


def _write(draft: Draft, conversion: Conversion, world: Group, progress: NoProgress) -> None:
    mine = list(conversion.shards.items())[world.rank :: world.size]
    finished = {name for name, _ in mine if draft.is_whole(name)}
    sizes = {name: shard.nbytes for name, shard in mine}
    with progress.counting(sum(sizes.values()), sum(sizes[name] for name in finished)):
        for name, shard in mine:
            if name not in finished:
                draft.write(name, partial(conversion.write, shard), progress.advance)


def _finish(draft: Draft, conversion: Conversion) -> None:
    names = list(conversion.shards)

    def complete(folder: Path) -> None:
        known = {name: draft.known(name) for name in names}
        conversion.complete(folder, {name: each["record"] for name, each in known.items() if each})

    draft.publish(names, complete)


def _check_space(draft: Draft, conversion: Conversion) -> None:
    wanted = sum(shard.nbytes for name, shard in conversion.shards.items() if draft.known(name) is None)
    free = shutil.disk_usage(draft.folder).free
    if wanted > free:
        raise TargetError(
            f"{draft.target} needs {wanted / 2**30:.1f} GiB more and {free / 2**30:.1f} GiB are free there: "
            "make room, or choose a folder on another disk"
        )
