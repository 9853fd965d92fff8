"""Time of an update with shared prompts, beside one that reads every response on its own.

python tools/bench_sharing.py MODEL [--answers 64] [--repeats 3] [--json FILE]

MODEL is a Hugging Face folder (tools/smollm2.py makes one). An update trains, with TROLL, on as many answers
of 32 tokens, behind prompts of 8, 32 and 96 tokens, in groups of 2 to 16: the forward and backward of
Megatron's schedule, the head and the optimizer. The model, objective and weights of all are the same and they
take turns; the first turn is a warm-up. FLOPs are those of `mtroll train`'s MFU: of the tokens that are read.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_record
import numpy as np
import torch
import torch.distributed as dist
from bench_methods import troll

from megatron_troll.config import Config, Layout, Model, Models, Optimizer, RolloutConfig, Train
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.shape import read_shape
from megatron_troll.observe.phases import Phases
from megatron_troll.rollout.engine import Completion, Request, Setup, rollout_of
from megatron_troll.training.build import open_policy
from megatron_troll.training.learner import Learner
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.throughput import cost_of, repeated_tokens
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import Prompt, Rollout

ANSWER, PROMPTS, GROUPS = 32, (8, 32, 96), (2, 4, 8, 16)
TOKEN_BUDGET = 2048


@dataclass(frozen=True)
class Work:
    """The rollouts of one update, and the learner that trains on them."""

    prompt_tokens: int
    samples: int
    shared: bool
    learner: Learner
    rollouts: list[Rollout]

    @property
    def name(self) -> str:
        kind = "read once" if self.shared else "read by each"
        return f"prompts of {self.prompt_tokens} for {self.samples}, {kind}"

    def update(self) -> float:
        """Seconds of one update."""
        advantages = np.random.default_rng(0).standard_normal(len(self.rollouts)).tolist()
        began = time.perf_counter()
        learned = self.learner.learn(self.rollouts, advantages, step=1)
        seconds = time.perf_counter() - began
        assert not learned.skipped, learned
        return seconds

    @property
    def tokens(self) -> int:
        """Tokens that the update reads, but for prompts that are read again where a group is cut."""
        whole = sum(len(r.prompt_ids) + len(r.response_ids) for r in self.rollouts)
        return whole - repeated_tokens(self.rollouts) if self.shared else whole


def works(policy: Trainable, path: str, answers: int) -> Iterator[Work]:
    """Every group size with shared prompts, and one without: there the size changes nothing."""
    trainer = PolicyTrainer(policy, troll(), Head(policy.model))
    for prompt_tokens in PROMPTS:
        for shared, sizes in ((False, GROUPS[-1:]), (True, GROUPS)):
            config = config_of(path, shared)
            learner = Learner(trainer, MicroBatcher(config, policy.model, Layout()), Phases())
            for samples in sizes:
                rollouts = drawn(config, policy, answers // samples, samples, prompt_tokens)
                yield Work(prompt_tokens, samples, shared, learner, rollouts)


def config_of(path: str, shared: bool) -> Config:
    model = Model(path=path, dtype="fp32", optimizer=Optimizer(lr=1e-6, distributed=False))
    return Config(
        name="bench",
        models=Models(policy=model),
        train=Train(updates=1, token_budget=TOKEN_BUDGET, share_prefixes=shared),
        rollout=RolloutConfig(top_k=0),
    )


def drawn(config: Config, policy: Trainable, prompts: int, samples: int, prompt_tokens: int) -> list[Rollout]:
    """Answers of any tokens: their time does not depend on which."""
    chance, vocab = np.random.default_rng(0), policy.model.shape.vocab
    silent: Any = SimpleNamespace(decode=lambda ids, **_: "")
    setup = Setup(config, policy.model, Path(config.policy.path), silent, ())
    rollouts = []
    for group in range(prompts):
        ids = chance.integers(0, vocab, prompt_tokens)
        for sample in range(samples):
            request = Request(Prompt(f"p{group}", (), ""), group, sample, ids)
            answer = Completion(
                chance.integers(0, vocab, ANSWER),
                np.full(ANSWER, -np.log(vocab), dtype=np.float32),
                None,
                np.zeros(ANSWER, dtype=np.int64),
                "length",
            )
            rollouts.append(rollout_of(setup, request, answer, config.rollout.sampling, round=0))
    return rollouts


def measure(path: str, answers: int, repeats: int) -> list[bench_record.Record]:
    groups, shape = parallel.start(Layout(), seed=0), read_shape(path)
    policy = open_policy(config_of(path, True).policy, shape, groups, 0, 10**6, lambda: None)
    every = list(works(policy, path, answers))
    turns: list[list[float]] = [[] for _ in every]
    for turn in range(repeats + 1):
        for work, taken in zip(every, turns):
            taken.append(work.update())
            print(f"turn {turn}: {work.name}: {taken[-1]:.2f} s", flush=True)
    rows = []
    for work, taken in zip(every, turns):
        context = work.prompt_tokens + ANSWER
        flops = cost_of(shape).flops(0, work.tokens, context / 2)
        apart = next(
            t for w, t in zip(every, turns) if not w.shared and w.prompt_tokens == work.prompt_tokens
        )
        rows.append(
            {
                "prompt_tokens": work.prompt_tokens,
                "samples": work.samples,
                "shared": work.shared,
                "tokens_read": work.tokens,
                "seconds": statistics.median(taken[1:]),
                "of_apart": statistics.median(mine / theirs for mine, theirs in zip(taken[1:], apart[1:])),
                "s_per_tflop": statistics.median(taken[1:]) / (flops / 1e12),
                "turns": taken[1:],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = measure(arguments.model, arguments.answers, arguments.repeats)
        parallel.stop()
    for row in rows:
        print(
            "prompts of {prompt_tokens}, groups of {samples}, shared: {shared}: {seconds:.2f} s, "
            "{of_apart:.2f} of apart, {s_per_tflop:.2f} s a TFLOP".format(**row)
        )
    if arguments.json is not None:
        bench_record.write(
            arguments.json, bench_record.record("cpu", rows, answers=arguments.answers, answer_tokens=ANSWER)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
