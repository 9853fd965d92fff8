"""One request to a server's /generate and its reply: token ids out, tokens with log-probs and top-K back."""

import base64
import binascii
import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_troll.batching.experts import expert_dtype, unrecorded
from megatron_troll.config import Sampling
from megatron_troll.rollout.sglang.http import BadReply, ServerFault, WrongServer
from megatron_troll.rollout.sglang.topk import LOWEST, Size, field, floats, topk_of
from megatron_troll.types import FinishReason, TokenTopK


@dataclass(frozen=True)
class Routed:
    """Contents of an experts record at each token: `per_token` of `experts`, in each of `layers`."""

    layers: int
    per_token: int
    experts: int


FINISHED: tuple[FinishReason, ...] = ("stop", "length", "abort")
ALL_TOKENS = -1
# What every request sets, whatever the server prefers.
SAMPLING_PARAMS = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "sampling_seed"),
    "skip_special_tokens",
)


@dataclass(frozen=True)
class GenerationRequest:
    """Request for one answer, or for the rest of one that was interrupted.

    ids         prompt and the answer so far
    max_tokens  how many more tokens the answer may have
    top_k       top-K entries per position, at most the size of the vocabulary; 0: none
    seed        for a server in deterministic mode; others use their own random numbers
    routed      the experts to return; None: none
    """

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    top_k: int
    vocab: int
    seed: int
    routed: Routed | None = None

    def body(self, rid: str) -> dict[str, Any]:
        """The JSON of the request. A server aborts every request whose `rid` has a given prefix."""
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
        if self.routed is not None:
            body["return_routed_experts"] = True
        return body


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of a part, sampled from the weights that the server calls `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """Result of one request: ids int32, logp float32 [T], top-K and the weights behind each token; the
    experts of all tokens that the server read, if it sampled any."""

    ids: np.ndarray
    logp: np.ndarray
    topk: TokenTopK | None
    spans: tuple[Span, ...]
    finish: FinishReason
    experts: np.ndarray | None = None


def score_body(ids: Sequence[int], top_k: int) -> dict[str, Any]:
    """The JSON of a request for the top-K after every token of `ids`, at temperature 1; samples no token."""
    return {
        "input_ids": list(ids),
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
    }


def score_of(reply: Any, length: int, top_k: int, vocab: int) -> TokenTopK:
    """The top-K [length - 1, top_k] after each but the last of `length` tokens. Raises BadReply."""
    return topk_of(field(reply, "meta_info", dict), "input", Size(length - 1, top_k, vocab))


def part_of(reply: Any, ask: GenerationRequest) -> Part:
    """Parse the answer in a reply's JSON. Raises BadReply if it does not match the request `ask`, ServerFault
    if the server gave up."""
    ids = _ids(field(reply, "output_ids", list), ask.vocab)
    meta = field(reply, "meta_info", dict)
    finish = _finish(meta, ids, ask)
    return Part(
        ids=ids,
        logp=_logp(meta, ids),
        topk=topk_of(meta, "output", Size(len(ids), ask.top_k, ask.vocab)) if ask.top_k else None,
        spans=_spans(meta, len(ids)),
        finish=finish,
        experts=_sampled_with(meta, len(ask.ids), len(ids), ask.routed) if ask.routed and len(ids) else None,
    )


def _sampled_with(meta: Mapping[str, Any], prompt: int, sampled: int, routed: Routed) -> np.ndarray:
    """The experts record of an answer, `unrecorded` throughout if the server retracted it: it then read
    everything again, and recorded the second reading."""
    experts = experts_of(meta, prompt + sampled - 1, routed)
    if meta.get("num_retractions"):
        experts[:] = unrecorded(routed.experts)
    return experts


def _ids(values: list[Any], vocab: int) -> np.ndarray:
    if not all(type(value) is int for value in values):
        raise BadReply(f"output_ids are not token ids: {str(values)[:200]}")
    ids = np.array(values, dtype=np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
        raise BadReply(f"token {ids.max()} is outside of the policy's vocabulary of {vocab}: another model?")
    return ids.astype(np.int32)


def _finish(meta: Mapping[str, Any], ids: np.ndarray, ask: GenerationRequest) -> FinishReason:
    reason = field(meta, "finish_reason", dict)
    finish, last = reason.get("type"), int(ids[-1]) if len(ids) else None
    if finish == "abort" and (reason.get("status_code") or 0) >= 400:
        raise ServerFault(f"the server gave up: {reason.get('message')}")
    if finish not in FINISHED:
        raise BadReply(f"finish_reason {reason} is not one of {', '.join(FINISHED)}")
    if finish == "stop" and last not in ask.stop_ids:
        raise BadReply(
            f"the answer stops at token {last}, which is not a stop token here: the server's model folder "
            "names another end of sequence; serve the run's model, or add the token to rollout.sampling.stop"
        )
    if len(ids) > ask.max_tokens or (finish == "length" and len(ids) < ask.max_tokens):
        raise BadReply(f"{len(ids)} tokens, finished by {finish}; asked for {ask.max_tokens}")
    return finish


def _logp(meta: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Log-probs [T]: the first number of each triple [log-prob, token id, text]."""
    triples = field(meta, "output_token_logprobs", list)
    try:
        values = [triple[0] for triple in triples]
        tokens = [triple[1] for triple in triples]
    except (TypeError, LookupError):
        raise BadReply(f"output_token_logprobs are not triples: {str(triples)[:200]}") from None
    if tokens != ids.tolist():
        raise BadReply("output_token_logprobs are not those of output_ids")
    logp = floats(values)
    bad = np.flatnonzero(~np.isfinite(logp) | (logp <= LOWEST))
    if bad.size:
        raise BadReply(
            f"the log-prob of response token {bad[0]} (id {ids[bad[0]]}) is {values[bad[0]]}: the server's "
            "weights or its arithmetic are broken; restart it, and if it comes back, serve another dtype"
        )
    return logp


def _spans(meta: Mapping[str, Any], length: int) -> tuple[Span, ...]:
    try:
        spans = tuple(Span(s["version"], s["start"], s["end"]) for s in field(meta, "weight_versions", list))
    except (TypeError, LookupError):
        raise BadReply(f"weight_versions are not spans: {str(meta['weight_versions'])[:200]}") from None
    edges = [0, *(span.end for span in spans)]
    if not spans or [span.start for span in spans] != edges[:-1] or edges[-1] != length:
        raise BadReply(f"weight_versions do not cover the {length} tokens: {str(spans)[:200]}")
    return spans


@dataclass(frozen=True)
class Versions:
    """Names of weight versions that no other run, and no earlier start of this one, uses: they distinguish a
    server that has these weights from one that was restarted, or that another run writes to."""

    name: str
    nonce: str = dataclasses.field(default_factory=lambda: secrets.token_hex(4))

    @property
    def run(self) -> str:
        return f"{self.name}.{self.nonce}"

    def called(self, number: int) -> str:
        """Name of the weights after training on `number` rollout batches."""
        return f"{self.run}.{number}"

    def number(self, version: str) -> int | None:
        """The inverse of `called`; None for names of other runs."""
        run, _, number = version.rpartition(".")
        return int(number) if run == self.run and number.isdigit() else None


def experts_of(meta: Mapping[str, Any], tokens: int, routed: Routed) -> np.ndarray:
    """The experts record [tokens, layers, per_token] of a reply's `meta_info`, which the server sends as
    base64 of int32, in any order. Raises WrongServer if there is none, BadReply."""
    sent = meta.get("routed_experts")
    if not isinstance(sent, str):
        raise WrongServer(
            "no routed experts, which train.replay=rollout replays: start the server with "
            "--enable-return-routed-experts (serve.routed_experts=true), or set train.replay to old or none"
        )
    try:
        flat = np.frombuffer(base64.b64decode(sent, validate=True), np.dtype("<i4"))
    except (ValueError, binascii.Error) as error:
        raise BadReply(f"routed_experts cannot be decoded: {error}") from error
    shape = (tokens, routed.layers, routed.per_token)
    if len(flat) != np.prod(shape):
        raise BadReply(f"{len(flat)} routed experts; expected [tokens, layers, experts per token] = {shape}")
    if len(flat) and (flat.min() < 0 or flat.max() >= routed.experts):
        raise BadReply(f"routed experts from {flat.min()} to {flat.max()}; the policy has {routed.experts}")
    return np.sort(flat.reshape(shape), axis=-1).astype(expert_dtype(routed.experts))


def continued(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """Join the records of an answer's parts. Each begins at the prompt: only the positions that the parts
    before it did not read are added. None without parts."""
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = np.concatenate([whole, part[len(whole) :]])
    return whole
