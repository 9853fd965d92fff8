"""Rows of JSONL and Parquet files, each with its place (file and line or row) for error messages."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DEEPEST = 100  # levels of lists and objects in a record
TOO_DEEP = f"lists and objects in more than {DEEPEST} levels"
# Errors of pyarrow for damaged pages and for values without a counterpart in Python.
UNREADABLE = (OSError, ValueError, OverflowError)


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
        # Decoded here: json.loads lets half a character (a lone surrogate) through as bytes.
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise Malformed(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Malformed(f"not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed(TOO_DEEP) from error
    except ValueError as error:  # an integer of thousands of digits
        raise Malformed(f"a number that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise Malformed(f"expected an object, got {type(value).__name__}")
    if line.count(b"[") + line.count(b"{") > DEEPEST or b"\\u" in line:
        check_value(value)
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Malformed(f"the key {twice!r:.80} is given twice in one object")
    return value


def check_value(value: Any) -> None:
    """Raise Malformed for a value that a later part of a run could not write or send: one nested deeper than
    DEEPEST, or text with half a character (a lone surrogate), which no file can hold."""
    level = [value]
    for _ in range(DEEPEST):
        for one in level:
            if isinstance(one, str):
                _check_text(one)
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise Malformed(TOO_DEEP)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise Malformed(
            f"text with half a character, U+{half:04X}, after {text[: error.start][-20:]!r}"
        ) from error


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch, path, number):
                    number += 1
                    yield row
    except Malformed as error:
        raise DataError(f"{path}: {error}") from error
    except (pa.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path}: cannot be read as Parquet after row {number}: {error}") from error


def _check_columns(fields: Iterable[pa.Field]) -> None:
    """Raise Malformed if two columns, or two fields of a structure, have one name."""
    fields = list(fields)
    names = Counter(field.name for field in fields)
    for field in fields:
        if names[field.name] > 1:
            raise Malformed(f"{names[field.name]} columns have the name {field.name!r:.80}")
        _check_columns(_fields_of(field.type))


def _fields_of(kind: pa.DataType) -> list[pa.Field]:
    if pa.types.is_struct(kind):
        return [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _fields_of(kind.value_type)
    return []


def _batch_rows(batch: pa.RecordBatch, path: Path, before: int) -> Iterator[Row]:
    """The rows of a batch that follows `before` rows. A value without a counterpart in Python (a timestamp
    beyond year 9999, text that is not UTF-8) makes its own row malformed only."""
    try:
        values = batch.to_pylist()
    except UNREADABLE:
        values = [None] * len(batch)
    for index, value in enumerate(values):
        where = f"{path} row {before + index + 1}"
        try:
            value = value if value is not None else batch.slice(index, 1).to_pylist()[0]
            check_value(value)
            yield Row(where, value)
        except (Malformed, *UNREADABLE) as error:
            yield Row(where, {}, str(error) if isinstance(error, Malformed) else f"a value: {error}")
