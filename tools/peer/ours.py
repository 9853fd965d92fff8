"""One side of tools/bench_peer.py: this project, a step for each line on stdin.

python tools/peer/ours.py MODEL PROMPTS.json SETTINGS.json METHOD
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from megatron_troll.config import (
    Config,
    Layout,
    Model,
    Models,
    ObjectiveConfig,
    Optimizer,
    RolloutConfig,
    Sampling,
    Slot,
    Train,
)
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.shape import read_shape
from megatron_troll.objectives.compose import compose, resolve
from megatron_troll.observe.phases import Phases
from megatron_troll.rollout.engine import Request, Setup
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.training.build import open_policy
from megatron_troll.training.learner import Learner
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import Prompt


class Steps:
    """The engine and the learner of one policy, and the prompts they work on."""

    def __init__(self, folder: str, texts: list[str], settings: dict[str, Any], method: str) -> None:
        self.settings, self.texts, self.done = settings, texts, 0
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.config = config_of(folder, settings, method)
        groups, shape = parallel.start(Layout(), seed=0), read_shape(folder)
        policy = open_policy(self.config.policy, shape, groups, 0, 10**6, lambda: None)
        trainer = PolicyTrainer(policy, compose(self.config.objective), Head(policy.model))
        self.learner = Learner(trainer, MicroBatcher(self.config, policy.model, Layout()), Phases())
        silent: Any = SimpleNamespace(decode=lambda ids, **_: "")
        self.engine = InProcessEngine(Setup(self.config, policy.model, Path(folder), silent, ()))

    def step(self) -> dict[str, float]:
        """Seconds of generation, of the update, and of the whole step."""
        began = time.perf_counter()
        rollouts = self.engine.generate(self._requests(), self.config.rollout.sampling, round=self.done)
        assert all(len(rollout.response_ids) == self.settings["tokens"] for rollout in rollouts)
        generated = time.perf_counter()
        rewards = torch.tensor([int(rollout.response_ids.sum()) % 7 / 7 for rollout in rollouts])
        grouped = rewards.view(-1, self.settings["samples"])
        centred = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        learned = self.learner.learn(rollouts, centred.flatten().tolist(), step=self.done)
        assert not learned.skipped
        ended = time.perf_counter()
        self.done += 1
        return {"generation": generated - began, "update": ended - generated, "step": ended - began}

    def _requests(self) -> list[Request]:
        count = self.settings["prompts"]
        texts = [self.texts[(self.done * count + i) % len(self.texts)] for i in range(count)]
        ids = [self.tokenizer(text, return_tensors="np")["input_ids"][0] for text in texts]
        return [
            Request(Prompt(f"p{i}", (), ""), i, sample, ids[i])
            for i in range(count)
            for sample in range(self.settings["samples"])
        ]


def config_of(folder: str, settings: dict[str, Any], method: str) -> Config:
    model = Model(path=folder, dtype="fp32", optimizer=Optimizer(lr=1e-6, distributed=False))
    sampling = Sampling(max_tokens=settings["tokens"])
    return Config(
        name="bench",
        models=Models(policy=model),
        train=Train(updates=settings["updates"], token_budget=settings["token_budget"]),
        objective=resolve(ObjectiveConfig(trust_region=Slot(name=method))),
        rollout=RolloutConfig(
            prompts=settings["prompts"], samples=settings["samples"], top_k=0, sampling=sampling
        ),
    )


def main() -> None:
    folder, prompts, settings_file, method = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        steps = Steps(folder, json.loads(Path(prompts).read_text()), settings, method)
        print(json.dumps({"ready": True}), flush=True)
        while sys.stdin.readline():
            print(json.dumps(steps.step()), flush=True)
            print(json.dumps({"ready": True}), flush=True)
        parallel.stop()


if __name__ == "__main__":
    main()
