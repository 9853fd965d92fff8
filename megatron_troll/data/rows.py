"""Rows of JSONL and Parquet files, each with its place (file and line or row) for error messages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class DataError(ValueError):
    """Data or a tokenizer cannot be used; the message names the file, the line or row, and what to do."""


class Malformed(ValueError):
    """A record cannot be read; the message says why. The reader adds the place, and raises or counts it."""


@dataclass(frozen=True)
class Row:
    """One record. `problem` says why it could not be read; then `value` is empty."""

    where: str
    value: dict[str, Any]
    problem: str | None = None


def read_rows(path: str | Path) -> Iterator[Row]:
    """Every row of a .jsonl or .parquet file; lines and rows count from 1, blank lines are skipped.
    Raises DataError for a file that is missing, empty, broken or of another type."""
    path = Path(path)
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file ending with .jsonl or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    empty = True
    for row in readers[path.suffix](path):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: the file holds no records")


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                yield Row(where, _json_object(line))
            except Malformed as error:
                yield Row(where, {}, str(error))


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise Malformed(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Malformed(f"not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected an object, got {type(value).__name__}")
    return value


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path} row {number}", value)
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from error
