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
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.trainer import Learner, PolicyTrainer
from megatron_troll.types import Prompt


def main() -> None:
    folder, prompts_file, settings_file, method = sys.argv[1:]
    settings = json.loads(Path(settings_file).read_text())
    texts = json.loads(Path(prompts_file).read_text())
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampling = Sampling(max_tokens=settings["tokens"])
    model = Model(path=folder, optimizer=Optimizer(lr=1e-6, distributed=False))
    config = Config(
        name="bench",
        models=Models(policy=model),
        train=Train(updates=settings["updates"], token_budget=settings["token_budget"]),
        objective=resolve(ObjectiveConfig(trust_region=Slot(name=method))),
        rollout=RolloutConfig(
            prompts=settings["prompts"], samples=settings["samples"], top_k=0, sampling=sampling
        ),
    )
    with tempfile.TemporaryDirectory() as store:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        groups, shape = parallel.start(Layout(), seed=0), read_shape(folder)
        policy = open_policy(model, shape, groups, 0, 10**6, lambda: None)
        trainer = PolicyTrainer(policy, compose(config.objective), Head(policy.model))
        learner = Learner(trainer, MicroBatcher(config, policy.model, Layout()), Phases())
        silent: Any = SimpleNamespace(decode=lambda ids, **_: "")
        engine = InProcessEngine(Setup(config, policy.model, Path(folder), silent, ()))
        step = 0
        while True:
            print(json.dumps({"ready": True}), flush=True)
            if not sys.stdin.readline():
                break
            began = time.perf_counter()
            chosen = [
                texts[(step * settings["prompts"] + i) % len(texts)] for i in range(settings["prompts"])
            ]
            requests = [
                Request(
                    Prompt(f"p{i}", (), ""), i, sample, tokenizer(text, return_tensors="np")["input_ids"][0]
                )
                for i, text in enumerate(chosen)
                for sample in range(settings["samples"])
            ]
            rollouts = engine.generate(requests, sampling, round=step)
            assert all(len(rollout.response_ids) == settings["tokens"] for rollout in rollouts)
            generated = time.perf_counter()
            rewards = torch.tensor([int(rollout.response_ids.sum()) % 7 / 7 for rollout in rollouts])
            groups_of = rewards.view(-1, settings["samples"])
            centred = (groups_of - groups_of.mean(1, keepdim=True)) / (groups_of.std(1, keepdim=True) + 1e-4)
            learned = learner.learn(rollouts, centred.flatten().tolist(), step=step)
            assert not learned.skipped
            ended, step = time.perf_counter(), step + 1
            seconds = {"generation": generated - began, "update": ended - generated, "step": ended - began}
            print(json.dumps(seconds), flush=True)
        parallel.stop()


if __name__ == "__main__":
    main()
