"""SHA-256 sums of the files of a folder, in the format of `sha256sum`: a changed bit is found by its file.

The process that writes a file of tensors sums it, while it is still in the system's memory. Before they are
loaded, each rank checks a share of the files.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megatron_troll.config import ConfigError
from megatron_troll.system import write_atomic

SUMS = "SHA256SUMS"
THREADS = 4
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class SumsError(ConfigError):
    """A file is not the one that was summed; the message names it."""


def sum_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sums of files in `folder` by name. Reads several at a time."""
    names = list(names)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sum_of(folder / name), names), strict=True))


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write `sums` into the folder; `sha256sum -c SHA256SUMS` checks them too."""
    write_atomic(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def read_sums(folder: Path) -> dict[str, str] | None:
    """The sums of a folder by name; None if it has none. Raises SumsError if they cannot be read."""
    path = folder / SUMS
    if not path.is_file():
        return None
    try:
        lines = path.read_text().splitlines()
    except ValueError as error:
        raise SumsError(f"{path} cannot be read ({error}): restore it, or delete it") from error
    found = [_LINE.fullmatch(line) for line in lines]
    if broken := [number for number, line in enumerate(found, 1) if line is None]:
        raise SumsError(f"{path}, line {broken[0]}, is not a SHA-256 sum: restore the file, or delete it")
    return {line[2]: line[1] for line in found if line is not None}


def check_sums(
    folder: Path, sums: Mapping[str, str], names: Iterable[str], rank: int = 0, size: int = 1
) -> None:
    """Check this rank's share of the files `names`. Raises SumsError naming every file that differs or has no
    sum."""
    ordered = sorted(names, key=lambda name: (-(folder / name).stat().st_size, name))
    mine = ordered[rank::size]
    found = sums_of(folder, mine)
    if wrong := [str(folder / name) for name in mine if found[name] != sums.get(name)]:
        raise SumsError(
            f"{', '.join(wrong)}: not as {folder / SUMS} says: damaged, or changed after being written"
        )


def check_folder_sums(folder: Path, names: Iterable[str], rank: int, size: int) -> None:
    """Check this rank's share of the files `names`; does nothing if the folder has no sums of them. Raises
    SumsError."""
    sums, names = read_sums(folder), list(names)
    if sums is None or not any(name in sums for name in names):
        return
    if unsummed := [name for name in names if name not in sums]:
        raise SumsError(f"{folder / SUMS} does not name {unsummed[0]}: restore it, or delete it")
    check_sums(folder, sums, names, rank, size)


def summing(write: Callable[..., Any], folder: Path, rank: int) -> Callable[..., Any]:
    """`write`, Megatron's function that writes the tensors of a rank below `folder`, with sums afterwards."""
    return partial(_write_and_sum, write, folder, rank)


def _write_and_sum(write: Callable[..., Any], folder: Path, rank: int, *arguments: Any, **named: Any) -> Any:
    result = write(*arguments, **named)
    # A write that failed is in the results that Megatron reads; nothing is published then. What is not summed
    # here, `collect` leaves to the rank that publishes, which meets the same disk.
    with contextlib.suppress(OSError):
        names = [str(path.relative_to(folder)) for path in folder.glob(f"*/__{rank}_*")]
        write_atomic(folder / _own(rank), json.dumps(sums_of(folder, names)))
    return result


def collect(folder: Path) -> dict[str, str]:
    """The sums that the writers of all ranks left in a folder; removes their files."""
    sums: dict[str, str] = {}
    for path in sorted(folder.glob(_own("*"))):
        sums |= json.loads(path.read_text())
        path.unlink()
    return sums


def _own(rank: int | str) -> str:
    return f".sums_{rank}.json"
