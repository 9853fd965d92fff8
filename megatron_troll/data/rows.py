"""Rows of JSONL, JSON, Parquet and Arrow files, each with its place (file, line or row) for errors."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

AT_ONCE = 1024  # rows of a table that are converted together
IPC_FILE = b"ARROW1"  # the first bytes of an IPC file
DEEPEST = 100  # levels of lists and objects in a record
TOO_DEEP = f"lists and objects in more than {DEEPEST} levels"
# Errors of pyarrow for damaged pages and for values without a counterpart in Python.
UNREADABLE = (OSError, ValueError, OverflowError, KeyError)


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
    """Every row of a .jsonl, .json (a list of objects, or one on each line), .parquet or .arrow file; lines
    and rows count from 1, blank lines are skipped. Raises DataError for a file that is missing, empty, broken
    or of another type."""
    path = Path(path)
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".arrow": _arrow}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file ending with .jsonl, .json, .parquet or .arrow")
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


def _json(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        begin = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begin.startswith(b"["):
        yield from _jsonl(path)
        return
    try:
        values = _json_value(path.read_bytes())
    except Malformed as error:
        raise DataError(f"{path}: {error}") from error
    for number, value in enumerate(values, 1):
        where = f"{path} row {number}"
        try:
            _check_object(value)
            check_value(value)
            yield Row(where, value)
        except Malformed as error:
            yield Row(where, {}, str(error))


def _json_object(line: bytes) -> dict[str, Any]:
    value = _check_object(_json_value(line))
    if line.count(b"[") + line.count(b"{") > DEEPEST or b"\\u" in line:
        check_value(value)
    return value


def _check_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"expected an object, got {type(value).__name__}")
    return value


def _json_value(text: bytes) -> Any:
    try:
        # Decoded here: json.loads lets half a character (a lone surrogate) through as bytes.
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise Malformed(f"not valid JSON: {error.msg} at {line}column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise Malformed(f"not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed(TOO_DEEP) from error
    except ValueError as error:  # an integer of thousands of digits
        raise Malformed(f"a number that cannot be read: {error}") from error


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
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_columns(file.schema_arrow)
            yield from file.iter_batches(batch_size=AT_ONCE)

    return _table_rows(path, "Parquet", batches())


def _arrow(path: Path) -> Iterator[Row]:
    """The rows of an IPC file (Feather 2), or of an IPC stream, which `datasets` writes."""

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as file:
            if file.read(len(IPC_FILE)) == IPC_FILE:
                whole = pa.ipc.open_file(file)
                _check_columns(whole.schema)
                found = (whole.get_batch(index) for index in range(whole.num_record_batches))
            else:
                file.seek(0)
                stream = pa.ipc.open_stream(file)
                _check_columns(stream.schema)
                found = iter(stream)
            for batch in found:
                batch.validate(full=True)
                yield from (batch.slice(at, AT_ONCE) for at in range(0, len(batch), AT_ONCE))

    return _table_rows(path, "Arrow", batches())


def _table_rows(path: Path, kind: str, batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    number = 0
    try:
        for batch in batches:
            for row in _batch_rows(batch, path, number):
                number += 1
                yield row
    except Malformed as error:
        raise DataError(f"{path}: {error}") from error
    except (pa.ArrowException, *UNREADABLE) as error:
        raise DataError(f"{path}: cannot be read as {kind} after row {number}: {error}") from error


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
        values = batch.to_pylist(maps_as_pydicts="strict")
    except UNREADABLE:
        values = [None] * len(batch)
    for index, value in enumerate(values):
        where = f"{path} row {before + index + 1}"
        try:
            value = (
                value if value is not None else batch.slice(index, 1).to_pylist(maps_as_pydicts="strict")[0]
            )
            check_value(value)
            yield Row(where, value)
        except (Malformed, *UNREADABLE) as error:
            yield Row(where, {}, str(error) if isinstance(error, Malformed) else f"a value: {error}")
