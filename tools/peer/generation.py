"""One side of tools/bench_generation.py: a generation for each line on stdin, which names what is drawn.

python tools/peer/generation.py MODEL PROMPTS.json SETTINGS.json
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_troll.config import Config, Layout, Model, Models, Optimizer, RolloutConfig, Sampling
from megatron_troll.mcore import parallel
from megatron_troll.mcore.shape import read_shape
from megatron_troll.rollout.engine import Request, Setup
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.training.build import open_policy
from megatron_troll.types import Prompt


def requests_of(ids: list[np.ndarray], samples: int) -> list[Request]:
    return [
        Request(Prompt(f"p{i}", (), ""), i, sample, prompt)
        for i, prompt in enumerate(ids)
        for sample in range(samples)
    ]


def main() -> None:
    folder, prompts, settings_file = sys.argv[1:]
    settings: dict[str, Any] = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts: list[str] = json.loads(Path(prompts).read_text())
    ids = [tokenizer(text, return_tensors="np")["input_ids"][0] for text in texts]
    sampling = Sampling(max_tokens=settings["tokens"])
    model = Model(path=folder, dtype="fp32", optimizer=Optimizer(distributed=False))
    rollout = RolloutConfig(top_k=0, max_sequences=settings["max_sequences"], sampling=sampling)
    config = Config(name="bench", models=Models(policy=model), rollout=rollout)
    # Answers end at every so-many-th token id: their lengths have a long tail, the same on all sides.
    shape = read_shape(folder)
    stops = tuple(range(0, shape.vocab, settings["stop_every"]))
    silent: Any = SimpleNamespace(decode=lambda ids, **_: "")
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        groups = parallel.start(Layout(), seed=0)
        policy = open_policy(model, shape, groups, 0, 10**6, lambda: None)
        engine = InProcessEngine(Setup(config, policy.model, Path(folder), silent, stops))
        print(json.dumps({"ready": True}), flush=True)
        while line := sys.stdin.readline().strip():
            count, samples = settings["work"][line]
            began = time.perf_counter()
            drawn = engine.generate(requests_of(ids[:count], samples), sampling, round=0)
            seconds = time.perf_counter() - began
            lengths = sorted(len(rollout.response_ids) for rollout in drawn)
            print(
                json.dumps(
                    {
                        "tokens_per_s": sum(lengths) / seconds,
                        "tokens": sum(lengths),
                        "median": lengths[len(lengths) // 2],
                        "longest": lengths[-1],
                    }
                ),
                flush=True,
            )
            print(json.dumps({"ready": True}), flush=True)
        parallel.stop()


if __name__ == "__main__":
    main()
