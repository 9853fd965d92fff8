"""One request to a server's /generate and its answer: token ids out, tokens with log-probs and top-K back."""

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from megatron_troll.config.tree import Sampling
from megatron_troll.rollout.sglang.errors import BadReply, NotFinite, ServerFault, ShortTopK
from megatron_troll.types import NO_ID, FinishReason, TokenTopK

# SGLang sends the smallest float32 for the logarithm of 0.
LOWEST = float(np.finfo(np.float32).min)
FINISHED: tuple[FinishReason, ...] = ("stop", "length", "abort")
ALL_TOKENS = -1
BINARY = {"val": "float32", "idx": "int32"}


@dataclass(frozen=True)
class Ask:
    """One answer, or the rest of one that was cut off.

    ids         prompt and what there is of the answer
    max_tokens  what the answer may still have
    top_k       entries of the law per position, at most the size of the vocabulary; 0: none
    seed        of a server in deterministic mode; others draw as they like
    """

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    top_k: int
    vocab: int
    seed: int

    def body(self, rid: str) -> dict[str, Any]:
        """The JSON of the request. A server aborts by prefix of `rid`."""
        sampling = self.sampling
        body: dict[str, Any] = {
            "rid": rid,
            "input_ids": list(self.ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": self.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or ALL_TOKENS,
                "min_p": sampling.min_p,
                "stop_token_ids": list(self.stop_ids),
                "sampling_seed": self.seed,
                "skip_special_tokens": False,
            },
        }
        if self.top_k:
            body["top_logprobs_num"] = self.top_k
            body["return_flat_raw_output_top_logprobs"] = True
            body["return_flat_raw_top_logprobs_b64"] = True
        return body


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a part were drawn from the weights that the server calls `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """What one request gave: ids int64, logp float32 [T], top-K and the weights behind each token."""

    ids: np.ndarray
    logp: np.ndarray
    topk: TokenTopK | None
    spans: tuple[Span, ...]
    finish: FinishReason


def part_of(reply: Any, ask: Ask) -> Part:
    """The answer in a reply's JSON. Raises BadReply where it is not one to `ask`, ServerFault where the
    server gave up."""
    ids = _ids(_field(reply, "output_ids", list), ask.vocab)
    meta = _field(reply, "meta_info", dict)
    finish = _finish(meta, ids, ask)
    return Part(
        ids=ids,
        logp=_logp(meta, ids),
        topk=_topk(meta, len(ids), ask) if ask.top_k else None,
        spans=_spans(meta, len(ids)),
        finish=finish,
    )


def _field(reply: Any, name: str, kind: type) -> Any:
    value = reply.get(name) if isinstance(reply, Mapping) else None
    if not isinstance(value, kind):
        raise BadReply(f"the answer has no {kind.__name__} {name!r}: {str(reply)[:200]}")
    return value


def _ids(values: list[Any], vocab: int) -> np.ndarray:
    if not all(type(value) is int for value in values):
        raise BadReply(f"output_ids are not token ids: {str(values)[:200]}")
    ids = np.array(values, dtype=np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
        raise BadReply(f"token {ids.max()} is outside of the policy's vocabulary of {vocab}: another model?")
    return ids


def _finish(meta: Mapping[str, Any], ids: np.ndarray, ask: Ask) -> FinishReason:
    reason = _field(meta, "finish_reason", dict)
    finish, last = reason.get("type"), int(ids[-1]) if len(ids) else None
    if finish == "abort" and (reason.get("status_code") or 0) >= 400:
        raise ServerFault(f"the server gave up: {reason.get('message')}")
    if finish not in FINISHED:
        raise BadReply(f"finish_reason {reason} is none of {', '.join(FINISHED)}")
    if finish == "stop" and last not in ask.stop_ids:
        raise BadReply(
            f"the answer stops at token {last}, which ends none here: the server's model folder names "
            "another end of sequence; serve the policy's folder, or add the token to rollout.sampling.stop"
        )
    if len(ids) > ask.max_tokens or (finish == "length" and len(ids) < ask.max_tokens):
        raise BadReply(f"{len(ids)} tokens, finished by {finish}; asked for {ask.max_tokens}")
    return finish


def _logp(meta: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """The first number of each triple [log-prob, token id, text]."""
    triples = _field(meta, "output_token_logprobs", list)
    try:
        values = [triple[0] for triple in triples]
        tokens = [triple[1] for triple in triples]
    except (TypeError, LookupError):
        raise BadReply(f"output_token_logprobs are not triples: {str(triples)[:200]}") from None
    if tokens != ids.tolist():
        raise BadReply("output_token_logprobs are of other tokens than output_ids")
    logp = _floats(values)
    bad = np.flatnonzero(~np.isfinite(logp) | (logp <= LOWEST))
    if bad.size:
        raise NotFinite(
            f"the log-prob of response token {bad[0]} (id {ids[bad[0]]}) is {values[bad[0]]}: the server's "
            "weights or its arithmetic are broken; restart it, and where it comes back, serve another dtype"
        )
    return logp


def _floats(values: Sequence[Any]) -> np.ndarray:
    """float32; null, which is how JSON has a NaN, becomes one."""
    try:
        return np.array([np.nan if value is None else value for value in values], dtype=np.float32)
    except (TypeError, ValueError):
        raise BadReply(f"log-probs are not numbers: {str(values)[:200]}") from None


def _topk(meta: Mapping[str, Any], length: int, ask: Ask) -> TokenTopK:
    """From whichever form the server sent."""
    if "output_top_logprobs_idx_flat_b64" in meta:
        logp, ids = (_binary(meta, kind) for kind in ("val", "idx"))
    elif "output_top_logprobs_idx_flat" in meta:
        _say_json_is_used()
        logp = _floats(_field(meta, "output_top_logprobs_val_flat", list))
        ids = _int32(_field(meta, "output_top_logprobs_idx_flat", list))
    else:
        _say_json_is_used()
        return _nested(_field(meta, "output_top_logprobs", list), length, ask)
    shape = meta.get("output_top_logprobs_shape")
    if meta.get("output_top_logprobs_null_prefix") != 0 or not _is_shape(shape, length, len(ids), len(logp)):
        raise BadReply(f"{len(ids)} top-K entries in the shape {shape}; expected {length} x {ask.top_k}")
    return record(ids.reshape(shape), logp.reshape(shape), ask)


def _is_shape(shape: Any, length: int, *sizes: int) -> bool:
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)):
        return False
    return shape[0] == length and all(size == shape[0] * shape[1] for size in sizes)


def _binary(meta: Mapping[str, Any], kind: str) -> np.ndarray:
    name = f"output_top_logprobs_{kind}_flat_b64"
    if meta.get(f"{name}_dtype") != BINARY[kind]:
        raise BadReply(f"{name} is of dtype {meta.get(f'{name}_dtype')}, not {BINARY[kind]}")
    try:
        return np.frombuffer(base64.b64decode(meta[name], validate=True), dtype=f"<{BINARY[kind][0]}4")
    except (TypeError, ValueError, binascii.Error) as error:
        raise BadReply(f"{name} cannot be decoded: {error}") from error


def _int32(values: Sequence[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.int32)
    except (TypeError, ValueError, OverflowError):
        raise BadReply(f"top-K ids are no integers: {str(values)[:200]}") from None


def _nested(rows: list[Any], length: int, ask: Ask) -> TokenTopK:
    """One list of triples [log-prob, token id, text] per position; widths may differ."""
    if len(rows) != length:
        raise BadReply(f"top-K of {len(rows)} positions for {length} tokens")
    ids = np.full((length, ask.top_k), NO_ID, dtype=np.int32)
    logp = np.full(ids.shape, -np.inf, dtype=np.float32)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) < ask.top_k:
            raise _short(len(row) if isinstance(row, list) else 0, ask)
        try:
            ids[i] = _int32([triple[1] for triple in row[: ask.top_k]])
            logp[i] = _floats([triple[0] for triple in row[: ask.top_k]])
        except (TypeError, LookupError):
            raise BadReply(f"output_top_logprobs are not triples: {str(row)[:200]}") from None
    return record(ids, logp, ask)


def record(ids: np.ndarray, logp: np.ndarray, ask: Ask) -> TokenTopK:
    """Ids and log-probs [T, k] as they came, in the order that records have. Raises ShortTopK, NotFinite,
    BadReply."""
    if ids.shape[1] < ask.top_k and len(ids):
        raise _short(ids.shape[1], ask)
    ids, logp = ids[:, : ask.top_k].astype(np.int32), logp[:, : ask.top_k].astype(np.float32)
    impossible = logp <= LOWEST
    bad = np.argwhere(~np.isfinite(logp) & ~impossible)
    if bad.size:
        row, slot = bad[0]
        raise NotFinite(
            f"the top-K of response token {row} gives id {ids[row, slot]} the log-prob {logp[row, slot]}: "
            "the server's weights or its arithmetic are broken; restart it"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= ask.vocab):
        raise BadReply(f"top-K id {ids.max()} is outside of the policy's vocabulary of {ask.vocab}")
    return TokenTopK(*_ordered(np.where(impossible, NO_ID, ids), np.where(impossible, -np.inf, logp)))


def _ordered(ids: np.ndarray, logp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value descending, then id ascending; a server leaves ties in any order."""
    above, below = logp[:, :-1], logp[:, 1:]
    wrong = (below > above) | ((below == above) & (ids[:, 1:] < ids[:, :-1]))
    for row in np.flatnonzero(wrong.any(axis=1)):
        order = np.lexsort((ids[row], -logp[row]))
        ids[row], logp[row] = ids[row, order], logp[row, order]
    return ids, logp


def _short(found: int, ask: Ask) -> ShortTopK:
    return ShortTopK(
        f"{found} top-K entries per position, asked for {ask.top_k}: ask for fewer (rollout.top_k), or serve "
        "with SGLang, which gives any number"
    )


def _spans(meta: Mapping[str, Any], length: int) -> tuple[Span, ...]:
    try:
        spans = tuple(Span(s["version"], s["start"], s["end"]) for s in _field(meta, "weight_versions", list))
    except (TypeError, LookupError):
        raise BadReply(f"weight_versions are not spans: {str(meta['weight_versions'])[:200]}") from None
    edges = [0, *(span.end for span in spans)]
    if not spans or [span.start for span in spans] != edges[:-1] or edges[-1] != length:
        raise BadReply(f"weight_versions do not cover the {length} tokens: {str(spans)[:200]}")
    return spans


@cache
def _say_json_is_used() -> None:
    logging.getLogger(__name__).warning(
        "a server sends top-K as JSON, not in binary: several times the bytes; SGLang 0.5.23 sends binary"
    )
