"""What a real server answers, written down for the fake one of the unit tests.

python -m tests.sglang.recordings    writes recordings.json anew (needs `make sglang-env`)
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from megatron_troll.config import Sampling
from megatron_troll.rollout.sglang.wire import GenerationRequest, score_body
from tests.sglang.farm import Farm
from tests.sglang.model import END_ID, VOCAB, write_model

FILE = Path(__file__).with_name("recordings.json")
PROMPT = [2, 8, 9, 10, 4, 3]
GREEDY = Sampling(temperature=0.0)
NEVER = (VOCAB - 1,)
LENGTH = 12


class Endless(GenerationRequest):
    """Goes on to `max_tokens` whatever is drawn."""

    def body(self, rid: str) -> dict[str, Any]:
        body = super().body(rid)
        body["sampling_params"]["ignore_eos"] = True
        return body


def ask_of(top_k: int = 8) -> GenerationRequest:
    # Greedy, so that a recording can be made again.
    return Endless(PROMPT, LENGTH, GREEDY, NEVER, top_k, VOCAB, seed=1)


def ask(top_k: int = 8) -> dict[str, Any]:
    return ask_of(top_k).body("recorded-")


@dataclass(frozen=True)
class Exchange:
    """One request; `body` None: a GET."""

    name: str
    path: str
    body: Any = None


ANY_STOP = {"max_new_tokens": 40, "temperature": 0.0, "stop_token_ids": list(range(VOCAB))}
NOTHING_DRAWN = {"max_new_tokens": 0, "temperature": 1.0}
FIRST_LAW = {"input_ids": PROMPT, "return_logprob": True, "top_logprobs_num": 8}
JSON = {"return_flat_raw_top_logprobs_b64": False}
BROADCAST = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "g"}
MISSING = {"model_path": "/missing", "weight_version": "v"}
NAMED = {"new_version": "recorded", "abort_all_requests": False}

# In this order, since some change what others answer.
EXCHANGES = (
    Exchange("health", "/health"),
    Exchange("model_info", "/model_info"),
    Exchange("server_info", "/server_info"),
    Exchange("tokenize", "/tokenize", {"prompt": "sort 3142", "add_special_tokens": False}),
    Exchange("generate", "/generate", ask()),
    Exchange("generate_stop", "/generate", ask() | {"sampling_params": ANY_STOP}),
    Exchange("generate_flat_json", "/generate", ask() | JSON),
    Exchange(
        "generate_nested_json", "/generate", ask() | JSON | {"return_flat_raw_output_top_logprobs": False}
    ),
    Exchange("generate_without_topk", "/generate", ask(top_k=0)),
    Exchange("score", "/generate", score_body(PROMPT, 8)),
    Exchange("first_law", "/generate", FIRST_LAW | {"sampling_params": NOTHING_DRAWN}),
    Exchange("too_long", "/generate", ask() | {"input_ids": [5] * 300}),
    Exchange(
        "tensor_outside_of_a_session", "/update_weights_from_tensor", {"serialized_named_tensors": ["aGk="]}
    ),
    Exchange("broadcast_outside_of_a_session", "/update_weights_from_distributed", BROADCAST),
    Exchange("begin", "/begin_weight_update", {}),
    Exchange("begin_twice", "/begin_weight_update", {}),
    Exchange("end", "/end_weight_update", {}),
    Exchange("end_twice", "/end_weight_update", {}),
    Exchange("from_disk_missing", "/update_weights_from_disk", MISSING),
    Exchange("pause", "/pause_generation", {"mode": "retract"}),
    Exchange("flush", "/flush_cache", {}),
    Exchange("resume", "/continue_generation", {}),
    Exchange("name_weights", "/update_weight_version", NAMED),
    Exchange("checksums", "/weights_checker", {"action": "checksum"}),
    Exchange("abort", "/abort_request", {"rid": "nobody-"}),
)


def record(url: str, model: Path) -> dict[str, Any]:
    """Status and answer of every exchange, from a server of `model` that has done nothing yet; without the
    places of this machine."""
    with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
        answers = {exchange.name: _answer(client, exchange) for exchange in EXCHANGES}
    return json.loads(json.dumps(answers).replace(str(model), "/models/served"))


def _answer(client: httpx.Client, exchange: Exchange) -> dict[str, Any]:
    reply = (
        client.get(exchange.path) if exchange.body is None else client.post(exchange.path, json=exchange.body)
    )
    try:
        content = reply.json() if reply.content else None
    except ValueError:
        content = reply.text
    if exchange.name == "server_info":
        content = {name: content[name] for name in ("model_path", "tp_size", "version")}
    return {"path": exchange.path, "status": reply.status_code, "content": content}


def recorded() -> dict[str, Any]:
    """What is written down."""
    return json.loads(FILE.read_text())


def form(value: Any) -> Any:
    """The keys and types of an answer, its values left out; of a list, the form of its first entry."""
    if isinstance(value, dict):
        return {key: form(part) for key, part in sorted(value.items())}
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return type(value).__name__


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Farm(Path(folder)) as farm:
        model = write_model(Path(folder) / "model")
        server = farm.start(model).wait_until_healthy()
        assert END_ID < VOCAB
        FILE.write_text(json.dumps(record(server.url, model), indent=1) + "\n")
    sys.stdout.write(f"wrote {FILE}\n")


if __name__ == "__main__":
    main()
