"""A folder that is written file by file and can be resumed after a kill: finished files are not rewritten.

The complete folder gets its name in one rename. Until then everything is in `.NAME.part` beside it: files are
written under a temporary name, flushed to disk and renamed, and `records/` holds size and SHA-256 of each.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from megatron_troll.mcore.checkpoint_sums import SUMS, sum_of, write_sums
from megatron_troll.system import flush, write_atomic

IDENTITY = "conversion.json"
RECORDS = "records"
LOCK = "lock"
UNFINISHED = ".part"
# Smaller blocks are not worth handing to another thread.
BLOCK_BYTES = 2**18
# Bytes that are written before a flush to disk is started.
HELD_BACK_BYTES = 2**25
Fill = Callable[[BinaryIO], Any]


class ConversionError(RuntimeError):
    """A conversion failed; the message says why, and what to do."""


class TargetError(ValueError):
    """The target folder cannot be used."""


@dataclass(frozen=True)
class Draft:
    """The unfinished folder that will become `target`. `identity` (JSON) describes its content: only a draft
    of the same identity is resumed."""

    target: Path
    identity: dict[str, Any]

    @property
    def folder(self) -> Path:
        target = Path(os.path.abspath(self.target))
        return target.with_name(f".{target.name}{UNFINISHED}")

    def is_complete(self) -> bool:
        """Whether the target exists already, with the same identity. Raises TargetError if it holds anything
        else, or cannot be replaced by a finished folder."""
        if self.target.is_symlink():
            raise TargetError(f"{self.target} is a link: give the folder itself")
        if os.path.ismount(self.target):
            raise TargetError(f"{self.target} is the root of a file system: give a folder in it")
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return False
        if self.target.is_dir() and _read(self.target / IDENTITY) == self.identity:
            return True
        raise TargetError(f"{self.target} is not empty: choose another folder, or delete it")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the draft until the block ends: a new one, or one that an earlier conversion left.

        Raises TargetError if another process has locked it, or it has another identity.
        """
        try:
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            lock = open(self.folder / RECORDS / LOCK, "w")  # noqa: SIM115 - held until the end
        except OSError as error:
            raise self._failed(self.folder, error) from error
        with lock:
            self._take(lock)
            yield

    def known(self, name: str) -> dict[str, Any] | None:
        """`bytes`, `sha256` and `record` of a finished file; None if it has to be written."""
        path, known = self.folder / name, _record_in(self._record(name))
        if known is None or not path.is_file() or path.stat().st_size != known["bytes"]:
            return None
        return known

    def is_whole(self, name: str) -> bool:
        """Whether a file is finished and has its checksum. Reads it."""
        known = self.known(name)
        return known is not None and sum_of(self.folder / name) == known["sha256"]

    def write(self, name: str, fill: Fill, progress: Callable[[int], object] = lambda count: None) -> None:
        """Write a file with `fill`, whose result (JSON) is recorded once the file is on disk; `progress`
        gets the number of bytes of each write. Raises ConversionError if that fails, and leaves no partial
        file."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        try:
            with open(unfinished, "wb", buffering=0) as raw, Summed(raw, progress) as file:
                record = file.filled(fill)
                file.sync()
            known = {"bytes": unfinished.stat().st_size, "sha256": file.hexdigest(), "record": record}
            write_atomic(self._record(name), json.dumps(known))
            os.rename(unfinished, path)
            flush(path.parent)
        except OSError as error:
            raise self._failed(path, error) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def publish(self, names: list[str], complete: Callable[[Path], None]) -> None:
        """Call `complete` to write the small files beside `names`, which `write` wrote; write the checksums
        of all files, and rename the folder to the target. Raises ConversionError if that fails."""
        try:
            for leftover in self.folder.rglob(f"*{UNFINISHED}"):
                leftover.unlink()
            complete(self.folder)
            self._write_sums({name: known["sha256"] for name in names if (known := self.known(name))})
            os.rename(self.folder, os.path.abspath(self.target))
            flush(self.target.parent)
        except OSError as error:
            raise self._failed(self.target, error) from error
        self.tidy()

    def _write_sums(self, sums: dict[str, str]) -> None:
        """Write the checksums `sums`, and those of all other files, in the format of `sha256sum`; flush all
        to disk."""
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_dir() or (path.parent != self.folder / RECORDS and name not in (*sums, SUMS)):
                flush(path)
                if path.is_file():
                    sums[name] = sum_of(path)
        write_sums(self.folder, sums)
        flush(self.folder)

    def tidy(self) -> None:
        """Remove the records from the target: only an unfinished one needs them."""
        shutil.rmtree(self.target / RECORDS, ignore_errors=True)

    def _take(self, lock: IO[str]) -> None:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TargetError(f"{self.target} is being written by another process ({error})") from error
        there = _read(self.folder / IDENTITY)
        if there is None:
            try:
                write_atomic(self.folder / IDENTITY, _text(self.identity))
            except OSError as error:
                raise self._failed(self.folder / IDENTITY, error) from error
        elif there != self.identity:
            changed = [key for key in self.identity if there.get(key) != self.identity[key]]
            raise TargetError(
                f"{self.folder} holds an unfinished conversion that differs in {', '.join(changed)}: finish "
                "it with the command that began it, or delete it"
            )

    def _record(self, name: str) -> Path:
        return self.folder / RECORDS / f"{name.replace('/', '_')}.json"

    def _failed(self, path: Path, error: OSError) -> ConversionError:
        there = next(folder for folder in self.folder.parents if folder.exists())
        free = shutil.disk_usage(there).free / 2**30
        return ConversionError(
            f"writing {path} failed: {error} ({free:.1f} GiB are free there). What is finished is kept in "
            f"{self.folder}: the same command continues"
        )


class Summed:
    """A write-only file that computes its SHA-256, with only the methods that writers need. Large blocks are
    hashed while they are written, and written bytes are flushed to disk in the background."""

    def __init__(self, file: io.FileIO, progress: Callable[[int], object]) -> None:
        self._file = file
        self._progress = progress
        self._sum = hashlib.sha256()
        self._at = 0
        self._failure: OSError | None = None
        self._pool = ThreadPoolExecutor(2)
        # End of the bytes whose flush was started, and a call that waits for that flush. It raises if the
        # flush failed, because the system reports that only once.
        self._sent_to = 0
        self._sent: Callable[[], None] = lambda: None

    def __enter__(self) -> "Summed":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def filled(self, fill: Fill) -> Any:
        """Call `fill` and return its result. Raises OSError if a write failed, even if `fill` hides that."""
        try:
            return fill(cast("BinaryIO", self))
        except RuntimeError as error:
            # torch.save raises an error of its own after a failed write.
            if self._failure is None:
                raise
            raise self._failure from error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        summed = None
        if len(view) < BLOCK_BYTES:
            self._sum.update(view)
        else:
            summed = self._pool.submit(self._sum.update, view)
        try:
            self._write(view)
        except OSError as error:
            self._failure = error
            raise
        finally:
            if summed is not None:
                summed.result()
        return len(view)

    def sync(self) -> None:
        """Flush everything to disk. Raises OSError if that fails. Blocks."""
        self._sent()
        os.fsync(self._file.fileno())

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._at += done
        self._progress(done)
        if self._at - self._sent_to >= HELD_BACK_BYTES:
            self._sent()
            self._sent_to = self._at
            self._sent = self._pool.submit(os.fdatasync, self._file.fileno()).result

    def tell(self) -> int:
        return self._at

    def flush(self) -> None: ...

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file; None if it is missing. Raises TargetError if it is damaged."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{path} cannot be read ({error}): delete {path.parent}") from error
    if not isinstance(content, dict):
        raise TargetError(f"{path} is not what a conversion writes: delete {path.parent}")
    return content


def _record_in(path: Path) -> dict[str, Any] | None:
    """The record of a file; None if it is missing or damaged, so that the file is written again."""
    try:
        record = _read(path)
    except TargetError:
        return None
    return record if record and record.keys() == {"bytes", "sha256", "record"} else None
