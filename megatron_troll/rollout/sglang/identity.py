"""Checks that a server serves the model that the run samples from, its tokenizer and its distribution."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_troll.mcore.shape import ModelShape, read_shape
from megatron_troll.rollout.sglang.http import BadReply, Http, Refused, ServerFault, WrongServer
from megatron_troll.rollout.sglang.wire import SAMPLING_PARAMS
from megatron_troll.weights.quantised import quantisation_of

HEALTH_S = 20.0
# Log-probs are float32 sums over the vocabulary.
LAW_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Identity:
    """Properties that a server must match: the model in `folder`, with this shape. `text` is tokenized by
    both sides; `ids` are a prompt; `temperature` is that of the run's samples."""

    folder: Path
    shape: ModelShape
    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: Sequence[int]
    temperature: float

    @property
    def _remedy(self) -> str:
        return f"start the server from {self.folder}"

    async def check(self, http: Http, url: str) -> str:
        """Check the server and return the version of its weights. Raises Unreachable or ServerFault if it is
        not healthy, BadReply if a reply is malformed, WrongServer if it does not match the run."""
        await http.get(url, "/health", HEALTH_S)
        info = await http.get(url, "/model_info", HEALTH_S)
        if not isinstance(info, dict) or not isinstance(info.get("weight_version"), str):
            raise BadReply(f"{url}/model_info names no weight_version: {str(info)[:200]}; is it SGLang?")
        started = await http.get(url, "/server_info", HEALTH_S)
        if not isinstance(started, dict) or not isinstance(started.get("model_path"), str):
            raise BadReply(f"{url}/server_info names no model_path: {str(started)[:200]}; is it SGLang?")
        self._check_family(url, info)
        _check_sampling(url, info, started)
        self._check_sizes(url, Path(started["model_path"]))
        await self._check_tokenizer(http, url)
        if self.temperature != 1.0:
            await self._check_law(http, url)
        return info["weight_version"]

    def _check_family(self, url: str, info: dict[str, Any]) -> None:
        if info.get("model_type") != self.shape.family:
            raise WrongServer(
                f"{url} serves a model of type {info.get('model_type')!r}, the run samples from a "
                f"{self.shape.family!r}: {self._remedy}, or name another server"
            )

    def _check_sizes(self, url: str, folder: Path) -> None:
        """Check the sizes in the folder that the server was started from. /model_info gives the folder of its
        last weights, whose sizes may differ: a server may load experts of another size without an error."""
        if not (folder / "config.json").is_file():
            return  # the folder is on another machine; a sync of other shapes is refused, the probe compares
        if said := quantisation_of(folder):
            raise WrongServer(f"{url} serves {folder}, which is quantised ({said}): {self._remedy}")
        served = read_shape(folder)
        if served.vocab != self.shape.vocab:
            raise WrongServer(
                f"{url} serves {folder} with a vocabulary of {served.vocab}, the run's model has "
                f"{self.shape.vocab}: {self._remedy}"
            )
        differing = differences(self.shape, served)
        if differing:
            raise WrongServer(f"{url} serves {folder} with {'; '.join(differing)}: {self._remedy}")

    async def _check_tokenizer(self, http: Http, url: str) -> None:
        body = {"prompt": self.text, "add_special_tokens": False}
        try:
            reply = await http.post(url, "/tokenize", body, HEALTH_S)
        except (Refused, ServerFault):
            return  # started with --skip-tokenizer-init: only ids go in and out
        there = reply.get("tokens") if isinstance(reply, dict) else None
        here = self.tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if there != here:
            raise WrongServer(
                f"{url} has another tokenizer: {self.text!r:.60} is {str(there)[:100]} there, "
                f"{str(here)[:100]} here; {self._remedy}"
            )

    async def _check_law(self, http: Http, url: str) -> None:
        """Check the temperature of the log-probs: at temperature T, two log-probs of a position differ by
        1/T of their difference at temperature 1. A server may be set to ignore T in its log-probs."""
        plain = await self._first_token(http, url, 1.0, 0)
        tempered = await self._first_token(http, url, self.temperature, 1)
        if not plain:
            return  # weights that are not finite have no distribution; a sync replaces them
        (first, at_first), *others = plain.items()
        for token, logp in others:
            if token in tempered and first in tempered:
                expected = (logp - at_first) / self.temperature
                found = tempered[token] - tempered[first]
                if not math.isclose(expected, found, rel_tol=LAW_TOLERANCE, abs_tol=LAW_TOLERANCE):
                    raise WrongServer(
                        f"{url} gives log-probs that are not at temperature {self.temperature}: unset "
                        "SGLANG_RETURN_ORIGINAL_LOGPROB in the server's environment"
                    )

    async def _first_token(self, http: Http, url: str, temperature: float, tokens: int) -> dict[int, float]:
        """The likeliest tokens after `ids`, with their log-probs. With `tokens` = 0, a server samples none
        and returns log-probs at temperature 1."""
        sampling = {"max_new_tokens": tokens, "temperature": temperature, "ignore_eos": True}
        body = {
            "input_ids": list(self.ids),
            "return_logprob": True,
            "top_logprobs_num": min(8, self.shape.vocab),
            "sampling_params": sampling,
        }
        reply = await http.post(url, "/generate", body, HEALTH_S)
        try:
            entries = reply["meta_info"]["output_top_logprobs"][0]
            return {token: float(logp) for logp, token, _ in entries if logp is not None}
        except (TypeError, ValueError, LookupError):
            raise BadReply(f"{url} gives no log-probs of a first token: {str(reply)[:200]}") from None


def _check_sampling(url: str, info: dict[str, Any], started: dict[str, Any]) -> None:
    """Check that the server samples as requested. Parameters that it prefers apply wherever a request leaves
    them out, and change the distribution without a trace in the log-probs."""
    preferred = info.get("preferred_sampling_params") or {}
    if unasked := sorted(set(preferred) - set(SAMPLING_PARAMS)):
        given = ", ".join(f"{name}={preferred[name]!r}" for name in unasked)
        raise WrongServer(
            f"{url} samples with {given}, which the run does not ask for: start it without "
            "--preferred-sampling-params"
        )
    for flag in ("watermark_default_enabled", "watermark_enforce_all"):
        if started.get(flag):
            raise WrongServer(
                f"{url} watermarks what it samples: start it without --{flag.replace('_', '-')}"
            )


def differences(ours: ModelShape, theirs: ModelShape) -> list[str]:
    """List the sizes that differ, in words; if the number of layers differs, only that one."""
    if theirs.layers != ours.layers:
        return [f"layers {theirs.layers}, not {ours.layers}"]
    here, there = asdict(ours), asdict(theirs)
    return [f"{key} {there[key]}, not {here[key]}" for key in here if there[key] != here[key]]
