"""Jackpot with a rollout model of its own: a smaller model draws, both learn, both are kept and exported."""

import json

import pytest

from tests.documented import documented
from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Workplace, succeed, untimed

DECOUPLED = (
    "models.rollout={path: runs/small-warm/hf, dtype: fp32, layout: {tp: 2, ep: 2}, optimizer: {lr: 1e-3}}",
    "objective.trust_region.name=none",
    "objective.correction.name=jackpot",
    "evaluation.every=1",
    "train.replay=old",
)


@pytest.fixture(scope="module")
def small(warm: Workplace) -> Workplace:
    """The demo's smaller model after a short warm start, and a run of two steps that it draws for."""
    short = ["name=small-warm", "models.policy.path=runs/demo/small", "sft.steps=10"]
    succeed(warm.mtroll("sft", "warm.yaml", *short))
    succeed(warm.mtroll("train", "tiny.yaml", "name=decoupled", "train.steps=2", *DECOUPLED))
    return warm


def test_both_models_learn_and_the_weight_follows_the_kl(small: Workplace) -> None:
    _, first, second = small.metrics("decoupled")
    for row in (first, second):
        assert row["skipped_updates"] == row["rollout_model_skipped"] == 0
        assert row["grad_norm"] > 0
        assert row["rollout_model_grad_norm"] > 0
        assert row["rollout_trainer_kl"] > 0.01  # another model draws
        assert all(documented(name) for name in row)
    assert first["distill_weight"] == 1
    assert first["distill_kl"] > 0.1
    assert second["distill_weight"] == pytest.approx(2.718281828**0.2)


def test_what_is_drawn_is_of_the_rollout_model_and_what_is_exported_of_both(small: Workplace) -> None:
    """The rollouts of the first step have the log-probs of the smaller model's warm start; the export has its
    shape."""
    drawn = small.run("decoupled") / "rollouts" / "step_000001.0-of-1.jsonl.gz"
    assert largest_gap(small.run("small-warm") / "hf", drawn) < 1e-4
    layers = {
        folder: json.loads((small.run("decoupled") / folder / "config.json").read_text())["num_hidden_layers"]
        for folder in ("hf", "hf-rollout")
    }
    assert layers == {"hf": 4, "hf-rollout": 2}


def test_a_continued_run_is_the_same_to_the_last_bit(small: Workplace) -> None:
    succeed(small.mtroll("train", "tiny.yaml", "name=stopped", "train.steps=1", *DECOUPLED))
    succeed(small.mtroll("train", "runs/stopped", "resume=true", "train.steps=2"))
    assert untimed(small.metrics("stopped")) == untimed(small.metrics("decoupled"))
