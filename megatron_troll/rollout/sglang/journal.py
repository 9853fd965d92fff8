"""Answers on disk, written as they arrive: finished ones survive the process that requested them."""

import json
import logging
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_troll.rollout.engine import Completion
from megatron_troll.types import TokenTopK

# Arrays of a record and their dtypes: 12 bytes per token, 8 per top-K entry, 2 per expert.
DTYPES = {
    "ids": "<i4",
    "logp": "<f4",
    "versions": "<i4",
    "topk_ids": "<i4",
    "topk_logp": "<f4",
    "experts": "<u2",
}
FILE = re.compile(r"round_(\d{6,18})\.bin")
# CRC of the record from behind it to the end of the body, bytes of the body, and the head, which is JSON.
LINE = re.compile(rb"([0-9a-f]{8}) (([0-9]{1,18}) (.*)\n)")


@dataclass(frozen=True)
class Stored:
    """An answer, and a hash of what was asked."""

    asked: str
    answer: Completion


class Journal:
    """One file per round in `folder`, to which answers are appended: a line each, with a CRC and the shapes
    of the arrays that follow it. A record that is not whole, as after a kill, is dropped with all after it,
    and overwritten. Data is written to the operating system, not synced to disk: it survives the process,
    maybe not the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, IO[bytes]] = {}

    def read(self, round: int) -> dict[str, Stored]:
        """Read the answers of a round, by the names of their requests."""
        path = self._path(round)
        if not path.is_file():
            return {}
        data, whole = path.read_bytes(), 0
        answers: dict[str, Stored] = {}
        for name, stored, end in _records(data):
            answers[name], whole = stored, end
        if whole < len(data):
            logging.getLogger(__name__).warning(
                "%s: the %d bytes from byte %d on are no whole record of this version: what they answered is "
                "sampled again",
                *(path, len(data) - whole, whole),
            )
            with open(path, "r+b") as file:
                file.truncate(whole)
        return answers

    def add(self, round: int, name: str, stored: Stored) -> None:
        if round not in self._open:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open[round] = open(self._path(round), "ab", buffering=0)  # noqa: SIM115
        self._open[round].write(_record(name, stored))

    def forget(self, last: int) -> None:
        """Delete the rounds up to `last`, which are not requested again."""
        for path in self._folder.glob("round_*.bin"):
            named = FILE.fullmatch(path.name)
            if named is not None and path.is_file() and (round := int(named[1])) <= last:
                if round in self._open:
                    self._open.pop(round).close()
                path.unlink()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _path(self, round: int) -> Path:
        return self._folder / f"round_{round:06d}.bin"


def _record(name: str, stored: Stored) -> bytes:
    answer = stored.answer
    arrays: dict[str, np.ndarray] = {"ids": answer.ids, "logp": answer.logp, "versions": answer.versions}
    if answer.topk is not None:
        arrays |= {"topk_ids": answer.topk.ids, "topk_logp": answer.topk.logp}
    if answer.experts is not None:
        arrays["experts"] = answer.experts
    body = b"".join(array.astype(DTYPES[key]).tobytes() for key, array in arrays.items())
    shapes = {key: array.shape for key, array in arrays.items()}
    head = json.dumps({"name": name, "asked": stored.asked, "finish": answer.finish, "shapes": shapes})
    checked = f"{len(body)} {head}\n".encode() + body
    return f"{zlib.crc32(checked):08x} ".encode() + checked


def _records(data: bytes) -> Iterator[tuple[str, Stored, int]]:
    """Yield each complete record's name and content, and the position of its end."""
    start = 0
    while (line := LINE.match(data, start)) is not None:
        end = line.end() + int(line[3])
        if end > len(data) or zlib.crc32(data[line.start(2) : end]) != int(line[1], 16):
            return
        head = json.loads(line[4])
        yield head["name"], Stored(head["asked"], _answer(head, data[line.end() : end])), end
        start = end


def _answer(head: dict[str, Any], body: bytes) -> Completion:
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for key, shape in head["shapes"].items():
        count = int(np.prod(shape))
        arrays[key] = np.frombuffer(body, DTYPES[key], count, at).reshape(shape).copy()
        at += arrays[key].nbytes
    return Completion(
        ids=arrays["ids"],
        logp=arrays["logp"],
        topk=TokenTopK(arrays["topk_ids"], arrays["topk_logp"]) if "topk_ids" in arrays else None,
        versions=arrays["versions"],
        finish=head["finish"],
        experts=arrays.get("experts"),
    )
