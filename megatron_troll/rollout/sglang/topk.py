"""Reads the top-K of a reply, in any of SGLang's three formats, into the record that rollouts keep."""

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from megatron_troll.rollout.sglang.http import BadReply
from megatron_troll.types import NO_ID, TokenTopK

# SGLang sends the lowest float32 for the logarithm of 0.
LOWEST = float(np.finfo(np.float32).min)
DTYPES = {"val": "float32", "idx": "int32"}
Side = Literal["input", "output"]


@dataclass(frozen=True)
class Size:
    """Required size of a record: positions, entries per position, and size of the vocabulary."""

    positions: int
    top_k: int
    vocab: int


def topk_of(meta: Mapping[str, Any], side: Side, size: Size) -> TokenTopK:
    """The record from a reply's `meta_info`, of its prompt or its answer: from binary if the server sent it,
    otherwise from JSON, with one warning. A prompt's first token has no distribution. Raises BadReply."""
    name = f"{side}_top_logprobs"
    if f"{name}_idx_flat_b64" in meta:
        logp, ids = (_binary(meta, f"{name}_{kind}_flat_b64", DTYPES[kind]) for kind in DTYPES)
    elif f"{name}_idx_flat" in meta:
        _say_json_is_used()
        logp = floats(field(meta, f"{name}_val_flat", list))
        ids = _ints(field(meta, f"{name}_idx_flat", list))
    else:
        _say_json_is_used()
        return _record(*_nested(field(meta, name, list)[_without_law(side) :], size), size)
    shape, skipped = meta.get(f"{name}_shape"), meta.get(f"{name}_null_prefix")
    if skipped != _without_law(side) or not _fits(shape, size.positions, len(ids), len(logp)):
        raise BadReply(
            f"{name}: {len(ids)} entries in the shape {shape} after {skipped}; expected {size.positions} x "
            f"{size.top_k}"
        )
    return _record(ids.reshape(shape), logp.reshape(shape), size)


def field(reply: Any, name: str, kind: type) -> Any:
    """Return `name` of a mapping. Raises BadReply if it is not a `kind`."""
    value = reply.get(name) if isinstance(reply, Mapping) else None
    if not isinstance(value, kind):
        raise BadReply(f"the answer has no {kind.__name__} {name!r}: {str(reply)[:200]}")
    return value


def floats(values: Sequence[Any]) -> np.ndarray:
    """Convert to float32; null, which stands for NaN in JSON, becomes NaN. Raises BadReply."""
    try:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
    except (TypeError, ValueError):
        raise BadReply(f"log-probs are not numbers: {str(values)[:200]}") from None


def _ints(values: Sequence[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.int32)
    except (TypeError, ValueError, OverflowError):
        raise BadReply(f"top-K ids are not integers: {str(values)[:200]}") from None


def _binary(meta: Mapping[str, Any], name: str, dtype: str) -> np.ndarray:
    if meta.get(f"{name}_dtype") != dtype:
        raise BadReply(f"{name} is of dtype {meta.get(f'{name}_dtype')}, not {dtype}")
    try:
        return np.frombuffer(base64.b64decode(meta[name], validate=True), np.dtype(dtype).newbyteorder("<"))
    except (LookupError, TypeError, ValueError, binascii.Error) as error:
        raise BadReply(f"{name} cannot be decoded: {error}") from error


def _nested(rows: Sequence[Any], size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs [T, k] from one list of triples [log-prob, token id, text] per position."""
    if len(rows) != size.positions:
        raise BadReply(f"top-K of {len(rows)} positions; expected {size.positions}")
    ids = np.empty((size.positions, size.top_k), dtype=np.int32)
    logp = np.empty(ids.shape, dtype=np.float32)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) < size.top_k:
            raise _short(len(row) if isinstance(row, list) else 0, size)
        try:
            ids[i] = _ints([triple[1] for triple in row[: size.top_k]])
            logp[i] = floats([triple[0] for triple in row[: size.top_k]])
        except (TypeError, LookupError):
            raise BadReply(f"top-K entries are not triples: {str(row)[:200]}") from None
    return ids, logp


def _record(ids: np.ndarray, logp: np.ndarray, size: Size) -> TokenTopK:
    """Build the record from received arrays [T, k], in record order; probability 0 becomes padding."""
    if ids.shape[1] < size.top_k and len(ids):
        raise _short(ids.shape[1], size)
    ids, logp = ids[:, : size.top_k], logp[:, : size.top_k]
    impossible = logp <= LOWEST
    bad = np.argwhere(~np.isfinite(logp) & ~impossible)
    if bad.size:
        row, slot = bad[0]
        raise BadReply(
            f"the top-K of token {row} gives id {ids[row, slot]} the log-prob {logp[row, slot]}: the "
            "server's weights or its arithmetic are broken; restart it"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= size.vocab):
        raise BadReply(f"top-K id {ids.max()} is outside of the policy's vocabulary of {size.vocab}")
    return TokenTopK(
        *_ordered(
            np.where(impossible, NO_ID, ids).astype(np.int32),
            np.where(impossible, -np.inf, logp).astype(np.float32),
        )
    )


def _ordered(ids: np.ndarray, logp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by value descending, then id ascending; a server leaves ties in any order."""
    above, below = logp[:, :-1], logp[:, 1:]
    wrong = (below > above) | ((below == above) & (ids[:, 1:] < ids[:, :-1]))
    for row in np.flatnonzero(wrong.any(axis=1)):
        order = np.lexsort((ids[row], -logp[row]))
        ids[row], logp[row] = ids[row, order], logp[row, order]
    return ids, logp


def _fits(shape: Any, positions: int, *sizes: int) -> bool:
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)):
        return False
    return shape[0] == positions and all(size == shape[0] * shape[1] for size in sizes)


def _without_law(side: Side) -> int:
    return 1 if side == "input" else 0


def _short(found: int, size: Size) -> BadReply:
    return BadReply(
        f"{found} top-K entries per position, asked for {size.top_k}: ask for fewer (rollout.top_k), or "
        "serve with SGLang 0.5.23, which gives any number up to the vocabulary"
    )


@cache
def _say_json_is_used() -> None:
    logging.getLogger(__name__).warning(
        "top-K comes as JSON, not in binary: about five times the bytes. A sglang-router, or another "
        "version of SGLang, drops the request fields that ask for binary"
    )
