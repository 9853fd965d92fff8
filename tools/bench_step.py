"""Time of a whole training step under TROLL and PPO-clip: the overhead protocol of arXiv 2510.03817, D.5.

python tools/bench_step.py [--shape cpu] [--json FILE] [--repeats 7]

A step is what `mtroll train` does with a scored rollout batch: the pass that reads the old policy, then the
forward and backward of Megatron's schedule and the optimizer, once per update. Answers have 256 tokens. The
bound is near zero, so that TROLL projects every position from the second update on; in the first, the new
policy equals the old one.

Variants train the same model from the same weights on the same rollouts and take turns, so that other
load slows all of them. A variant whose head costs nothing shows how much of a step the head takes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import bench_record
import bench_tables
import numpy as np
import torch
import torch.distributed as dist
from bench_methods import MaterialisedHead, clip, sparse_clip, troll
from torch import Tensor

from megatron_troll.config import Config, Layout, Model, Models, Optimizer, RolloutConfig, Sampling, Train
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head, HeadContext, Scan
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives.objective import Objective
from megatron_troll.observe.phases import Phases
from megatron_troll.rollout.engine import Request, Setup
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.training.build import open_policy
from megatron_troll.training.learner import Learner
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import HeadOutputs, HeadRequest, Prompt, Rollout

BOUND = 1e-6
PROMPT_TOKENS, ANSWER_TOKENS, SAMPLES = 8, 256, 4
UNCHUNKED = 2**30
PHASES = ("old_policy", "forward_backward", "optimizer")


@dataclass(frozen=True)
class Shape:
    """A model with a small body and a large head; `updates` optimizer steps over `answers` answers."""

    hidden: int
    vocab: int
    answers: int
    updates: int
    token_budget: int
    dtype: Literal["fp32", "bf16"]
    k: int = 64

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json. Logits with a standard deviation near 3 give entropies like those of a
        language model."""
        return {
            "model_type": "qwen3",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": self.hidden // 4,
            "rms_norm_eps": 1e-6,
            "initializer_range": 3.0 / self.hidden**0.5,
            "max_position_embeddings": PROMPT_TOKENS + ANSWER_TOKENS,
            "rope_theta": 1e4,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "cpu": Shape(256, 32_768, answers=32, updates=4, token_budget=4096, dtype="fp32"),
    "30b_head": Shape(2048, 151_936, answers=128, updates=4, token_budget=8192, dtype="bf16"),
}


class NoHead(Head):
    """A head that only averages the hidden states: such a step takes the time of everything but the head."""

    def scan(self, hidden: Tensor, target: Tensor, *requests: HeadRequest) -> Scan:
        return Scan(hidden, target, None, None)

    def outputs(self, scan: Scan, reads: HeadRequest, beside: HeadContext | None = None) -> HeadOutputs:
        return HeadOutputs(logp=1e-3 * scan.hidden.float().mean(1), topk=None, entropy=None)

    def log_probs(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(hidden), 1)


@dataclass(frozen=True)
class Variant:
    """A trainer: its objective and its LM head."""

    name: str
    objective: Objective
    head: Head


@dataclass(frozen=True)
class Row:
    """Milliseconds of a step, the sum of its phases: medians, spread (largest - smallest), and every turn;
    the share of positions that were projected; peak memory of the step beyond its weights and gradients."""

    shape: str
    variant: str
    step_ms: float
    spread_ms: float
    old_policy_ms: float
    forward_backward_ms: float
    optimizer_ms: float
    projected: float | None
    peak_extra_mib: float
    turns_ms: list[float]


def variants(policy: Trainable, k: int) -> list[Variant]:
    head, whole = Head(policy.model), Head(policy.model, chunk=UNCHUNKED)
    rows, none = MaterialisedHead(policy.model), NoHead(policy.model)
    own, old = (troll(k=k, bound=BOUND, support=support) for support in ("own", "old"))
    return [
        Variant("clip/materialised", clip(), rows),
        Variant("clip/fused", clip(), head),
        Variant("clip/fused_unchunked", clip(), whole),
        Variant("clip/sparse", sparse_clip(k), head),
        Variant("troll/materialised", own, rows),
        Variant("troll/support_own", own, head),
        Variant("troll/support_own_unchunked", own, whole),
        Variant("troll/support_old", old, head),
        Variant("troll/support_old_unchunked", old, whole),
        Variant("no_head", clip(), none),
    ]


@dataclass(frozen=True)
class Bench:
    """One model, and a scored rollout batch to train it on repeatedly."""

    config: Config
    policy: Trainable
    rollouts: list[Rollout]
    advantages: list[float]
    weights: list[Tensor]

    @staticmethod
    def of(shape: Shape) -> "Bench":
        model = Model(
            path="none", init="random", dtype=shape.dtype, optimizer=Optimizer(lr=1e-4, distributed=False)
        )
        config = Config(
            name="bench",
            models=Models(policy=model),
            train=Train(updates=shape.updates, token_budget=shape.token_budget),
            rollout=RolloutConfig(top_k=0, sampling=Sampling(max_tokens=ANSWER_TOKENS)),
        )
        groups = parallel.start(Layout(), seed=0)
        policy = open_policy(model, shape_of(shape.config), groups, 0, 10**6, lambda: None)
        generator = np.random.default_rng(0)
        weights = [parameter.detach().clone() for parameter in policy.model.stages[0].parameters()]
        rollouts = sampled(config, policy, shape, generator)
        return Bench(config, policy, rollouts, generator.standard_normal(len(rollouts)).tolist(), weights)

    def learner(self, variant: Variant) -> Learner:
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        trainer = PolicyTrainer(self.policy, variant.objective, variant.head)
        return Learner(
            trainer, MicroBatcher(self.config, self.policy.model, Layout()), Phases(synchronize=synchronize)
        )

    @torch.no_grad()
    def rewind(self) -> None:
        """Restore the weights that every step starts from, and reset the optimizer's state."""
        for parameter, weight in zip(self.policy.model.stages[0].parameters(), self.weights):
            parameter.copy_(weight)
        self.policy.optimizer.reload_model_params()
        adam: Any = self.policy.optimizer
        for state in adam.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def sampled(config: Config, policy: Trainable, shape: Shape, generator: np.random.Generator) -> list[Rollout]:
    """Answers sampled from the model itself; none ends early, and no text is needed."""
    requests = []
    for i in range(shape.answers):
        ids = np.random.default_rng(i // SAMPLES).integers(0, shape.vocab, PROMPT_TOKENS)
        requests.append(Request(Prompt(f"p{i // SAMPLES}", (), ""), i // SAMPLES, i % SAMPLES, ids))
    silent: Any = SimpleNamespace(decode=lambda ids, **_: "")
    engine = InProcessEngine(Setup(config, policy.model, Path(config.policy.path), silent, ()))
    return engine.generate(requests, config.rollout.sampling, round=1)


def measure(name: str, repeats: int) -> list[Row]:
    bench = Bench.of(SHAPES[name])
    every = variants(bench.policy, SHAPES[name].k)
    learners = {variant.name: bench.learner(variant) for variant in every}
    taken: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in every}
    projected: dict[str, float | None] = {}
    for turn in range(repeats + 1):
        for label, learner in learners.items():
            began = time.perf_counter()
            metrics = step(bench, learner)
            print(f"turn {turn} of {repeats}: {label}, {time.perf_counter() - began:.1f} s", flush=True)
            projected[label] = metrics.get("projected")
            if turn:  # the first turn is a warm-up
                taken[label].append({n: 1e3 * s for n, s in learner.phases.take().items()})
            learner.phases.take()
    return [
        row_of(name, label, taken[label], projected[label], peak(bench, learner))
        for label, learner in learners.items()
    ]


def step(bench: Bench, learner: Learner) -> dict[str, float]:
    bench.rewind()
    learned = learner.learn(bench.rollouts, bench.advantages, step=1)
    assert not learned.skipped, learned
    return learned.metrics


def peak(bench: Bench, learner: Learner) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return bench_record.peak_mib(lambda: step(bench, learner), device)


def row_of(
    shape: str, variant: str, turns: Sequence[dict[str, float]], projected: float | None, peak: float
) -> Row:
    phases = [[turn[f"seconds/{phase}"] for phase in PHASES] for turn in turns]
    totals = [sum(parts) for parts in phases]
    total, spread = statistics.median(totals), max(totals) - min(totals)
    old, gradients, optimizer = (statistics.median(column) for column in zip(*phases))
    return Row(shape, variant, total, spread, old, gradients, optimizer, projected, peak, totals)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        rows = measure(arguments.shape, arguments.repeats)
        parallel.stop()
    record = bench_record.record(
        "cuda" if torch.cuda.is_available() else "cpu", [asdict(row) for row in rows]
    )
    print(bench_tables.of_step(record))
    if arguments.json is not None:
        bench_record.write(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
