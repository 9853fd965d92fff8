"""Measure what the SGLang client adds to the time of its server, and what a weight sync costs.

python tools/bench_rollout.py model FOLDER --gib 0.25     a random Qwen3 to measure syncs with
python tools/bench_rollout.py client CONFIG [KEY=VALUE ...]
python tools/bench_rollout.py sync CONFIG [KEY=VALUE ...]

The server must be running: `mtroll serve CONFIG` with the same KEY=VALUE. Prints JSON. `client` requests the
same answers by bare HTTP, which discards them, and by the run's client, in turns; figures are medians. `sync`
sends the policy to the server in every way (disk, tensor, distributed); memory is the peak of this process
above what it held before, in buckets of rollout.sglang.sync.bucket_mib.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_record import record

from megatron_troll import rollout
from megatron_troll.config import Config, Sampling
from megatron_troll.config.load import load
from megatron_troll.data.demo_model import write_base
from megatron_troll.mcore import parallel
from megatron_troll.rollout.engine import Completion, Setup
from megatron_troll.rollout.engines.sglang import SGLangEngine
from megatron_troll.rollout.sglang.client import NamedRequest
from megatron_troll.rollout.sglang.connection import Connection
from megatron_troll.rollout.sglang.journal import Journal, Stored
from megatron_troll.rollout.sglang.wire import GenerationRequest
from megatron_troll.task import Task, prepare
from megatron_troll.training.build import open_model

GIB, MIB = 2**30, 2**20
WAYS = ("disk", "tensor", "distributed")
AT_ONCE, QUESTIONS, LENGTH, TOP_K = 16, 32, 64, 64


class Endless(GenerationRequest):
    """A request that always continues to `max_tokens`: every repeat samples the same number of tokens."""

    def body(self, rid: str) -> dict[str, Any]:
        body = super().body(rid)
        body["sampling_params"]["ignore_eos"] = True
        return body


def write_model(folder: Path, gib: float) -> None:
    """Write config and tokenizer of a Qwen3 of about `gib` GiB in fp32, most of it in layers."""
    write_base(folder)
    width, ffn = 512, 2048
    layer = 4 * (4 * width * width + 3 * width * ffn)
    config = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": round(gib * GIB / layer),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3ForCausalLM"],
        "eos_token_id": 4,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


@contextmanager
def engine_of(config: Config, task: Task, model: Any) -> Iterator[SGLangEngine]:
    folder, shown = Path(config.policy.path), task.prompts.train[:8]
    engine = rollout.build(Setup(config, model, folder, task.tokenizer, task.stop_ids, shown))
    assert isinstance(engine, SGLangEngine)
    with closing(engine):
        yield engine


def client(config: Config, task: Task, model: Any, repeats: int) -> list[dict[str, Any]]:
    with engine_of(config, task, model) as engine:
        engine.sync(1)
        connection = engine.connection
        assert connection is not None
        url = connection.servers.healthy[0]
        times: dict[str, list[float]] = {}
        sent: list[int] = []
        answers: dict[int, Completion] = {}
        for repeat in range(repeats + 1):
            turn = {
                "bare": bare(url, TOP_K, sent),
                "client": drawn(connection, TOP_K, answers),
                "client, K = 0": drawn(connection, 0, {}),
            }
            for name, seconds in turn.items():
                times.setdefault(name, []).extend([seconds] if repeat else [])
    tokens = QUESTIONS * LENGTH
    rows = [
        {"what": name, "tokens_per_s": round(tokens / statistics.median(found)), "seconds": found}
        for name, found in times.items()
    ]
    overhead = [c / b - 1 for b, c in zip(times["bare"], times["client"])]
    cost = [c / n - 1 for n, c in zip(times["client, K = 0"], times["client"])]
    return [
        *rows,
        {"what": "client beside bare", "median": round(statistics.median(overhead), 4), "all": overhead},
        {"what": "K = 64 beside K = 0", "median": round(statistics.median(cost), 4), "all": cost},
        {"what": "bytes on the wire", "per_entry": round(sum(sent) / len(sent) / LENGTH / TOP_K, 2)},
        {"what": "bytes in the buffer", **stored(answers)},
    ]


def question(number: int, top_k: int) -> NamedRequest:

    ask = Endless([5, 6, 7, 8, 5 + number % 32], LENGTH, Sampling(), (4,), top_k, TOP_K, seed=number)
    return NamedRequest(f"{number}", ask)


def bare(url: str, top_k: int, sent: list[int]) -> float:
    async def all_of_them() -> float:
        slots = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=url, timeout=600.0, trust_env=False) as http:

            async def one(number: int) -> None:
                async with slots:
                    body = question(number, top_k).ask.body(f"bare-{time.monotonic_ns()}-{number}")
                    reply = (await http.post("/generate", json=body)).raise_for_status()
                    sent.append(len(reply.content))

            began = time.perf_counter()
            await asyncio.gather(*(one(i) for i in range(QUESTIONS)))
            return time.perf_counter() - began

    return asyncio.run(all_of_them())


def drawn(connection: Connection, top_k: int, answers: dict[int, Completion]) -> float:
    began = time.perf_counter()
    questions = [question(i, top_k) for i in range(QUESTIONS)]
    connection.background.run(connection.client.generate(questions, answers.__setitem__))
    return time.perf_counter() - began


def stored(answers: dict[int, Completion]) -> dict[str, float]:
    """Bytes per token of a journal with every answer, and 8 K + 12 to compare with."""
    with tempfile.TemporaryDirectory() as folder:
        for i, answer in answers.items():
            Journal(Path(folder)).add(1, str(i), Stored("0" * 64, answer))
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    tokens = sum(len(answer.ids) for answer in answers.values())
    return {"per_token": round(size / tokens, 1), "per_token_of_8_K_plus_12": 8 * TOP_K + 12}


@dataclass
class Peak:
    """Peak resident memory of this process in a `with` block, in bytes above what it held before."""

    before: int = field(default_factory=lambda: psutil.Process().memory_info().rss)
    most: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.002):
            self.most = max(self.most, process.memory_info().rss - self.before)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def sync(config: Config, task: Task, model: Any, repeats: int) -> list[dict[str, Any]]:
    size = sum(p.nbytes for chunk in model.chunks for p in chunk.parameters())
    rows = []
    for via in WAYS:
        settings = config.rollout.sglang
        with_way = settings.sync.model_copy(update={"via": via})
        sglang = settings.model_copy(
            update={"sync": with_way, "probe": settings.probe.model_copy(update={"prompts": 0})}
        )
        changed = config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": sglang})})
        with engine_of(changed, task, model) as engine:
            seconds, peaks = [], []
            for number in range(repeats + 1):
                with Peak() as peak:
                    began = time.perf_counter()
                    engine.sync(number)
                    seconds.append(time.perf_counter() - began)
                peaks.append(peak.most / (with_way.bucket_mib * MIB))
        per_gib = statistics.median(seconds[1:]) / (size / GIB)
        rows.append(
            {
                "via": via,
                "gib": round(size / GIB, 3),
                "s_per_gib": round(per_gib, 2),
                "peak_buckets": round(max(peaks), 2),
                "seconds": seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["model", "client", "sync"])
    parser.add_argument("path", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gib", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.what == "model":
        write_model(arguments.path, arguments.gib)
        return
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"})
    os.environ.setdefault("MASTER_PORT", "29571")
    alone = ["models.policy.layout={tp: 1, ep: 1}", "launch.ranks=1", f"rollout.sglang.concurrency={AT_ONCE}"]
    task = prepare(load(arguments.path, [*arguments.overrides, *alone]))
    config = task.config
    groups = parallel.start(config.policy.layout, config.seed)
    model = open_model(config.policy, task.shape, groups, config.seed, lambda: None)
    measure = client if arguments.what == "client" else sync
    print(json.dumps(record("cpu", measure(config, task, model, arguments.repeats)), indent=1))
    parallel.stop()


if __name__ == "__main__":
    main()
