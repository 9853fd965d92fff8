"""Answers on disk, written as they arrive: finished ones survive the process that requested them."""

import json
import zlib
from collections.abc import Iterator
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


class Journal:
    """One file per round in `folder`, to which answers are appended: a line of JSON each, with the shapes of
    the arrays that follow it. An incomplete last record, after a kill, is dropped and overwritten. Data is
    written to the operating system, not synced to disk: it survives the process, maybe not the machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, IO[bytes]] = {}

    def read(self, round: int) -> dict[str, Completion]:
        """Read the answers of a round, by the names of their requests."""
        path = self._path(round)
        if not path.is_file():
            return {}
        data, whole, answers = path.read_bytes(), 0, {}
        for name, answer, end in _records(data):
            answers[name], whole = answer, end
        if whole < len(data):
            with open(path, "r+b") as file:
                file.truncate(whole)
        return answers

    def add(self, round: int, name: str, answer: Completion) -> None:
        if round not in self._open:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._open[round] = open(self._path(round), "ab", buffering=0)  # noqa: SIM115
        self._open[round].write(_record(name, answer))

    def forget(self, last: int) -> None:
        """Delete the rounds up to `last`, which are not requested again."""
        for path in self._folder.glob("round_*.bin"):
            round = int(path.stem.removeprefix("round_"))
            if round <= last:
                if round in self._open:
                    self._open.pop(round).close()
                path.unlink()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _path(self, round: int) -> Path:
        return self._folder / f"round_{round:06d}.bin"


def _record(name: str, answer: Completion) -> bytes:
    arrays: dict[str, np.ndarray] = {"ids": answer.ids, "logp": answer.logp, "versions": answer.versions}
    if answer.topk is not None:
        arrays |= {"topk_ids": answer.topk.ids, "topk_logp": answer.topk.logp}
    if answer.experts is not None:
        arrays["experts"] = answer.experts
    body = b"".join(array.astype(DTYPES[key]).tobytes() for key, array in arrays.items())
    shapes = {key: array.shape for key, array in arrays.items()}
    head = {"name": name, "finish": answer.finish, "shapes": shapes, "crc": zlib.crc32(body)}
    return json.dumps(head).encode() + b"\n" + body


def _records(data: bytes) -> Iterator[tuple[str, Completion, int]]:
    """Yield each complete record's name and answer, and the position of its end."""
    start = 0
    while (line := data.find(b"\n", start)) >= 0:
        try:
            head = json.loads(data[start:line])
        except ValueError:
            return
        sizes = {
            key: np.dtype(DTYPES[key]).itemsize * int(np.prod(shape)) for key, shape in head["shapes"].items()
        }
        end = line + 1 + sum(sizes.values())
        if end > len(data) or zlib.crc32(data[line + 1 : end]) != head["crc"]:
            return
        yield head["name"], _answer(head, data[line + 1 : end], sizes), end
        start = end


def _answer(head: dict[str, Any], body: bytes, sizes: dict[str, int]) -> Completion:
    arrays: dict[str, np.ndarray] = {}
    at = 0
    for key, size in sizes.items():
        arrays[key] = np.frombuffer(body[at : at + size], DTYPES[key]).reshape(head["shapes"][key])
        at += size
    return Completion(
        ids=arrays["ids"].astype(np.int64),
        logp=arrays["logp"],
        topk=TokenTopK(arrays["topk_ids"], arrays["topk_logp"]) if "topk_ids" in arrays else None,
        versions=arrays["versions"].astype(np.int64),
        finish=head["finish"],
        experts=arrays.get("experts"),
    )
