"""`mtroll serve` and `mtroll train` of examples/configs/cpu_jackpot_sglang.yaml: the server has the rollout
model, the trainer both."""

import json
import shutil
import signal
from collections.abc import Iterator

import pytest

from megatron_troll.launch.ports import free_port
from tests.e2e.exported import largest_gap
from tests.e2e.workplace import REPOSITORY, Workplace, finish, succeed
from tests.sglang.farm import PYTHON
from tests.sglang.model import write_model

CONFIG = """
extends: {examples}/cpu_jackpot_sglang.yaml
models:
  policy: {{path: runs/demo/base, init: random}}
  rollout: {{path: small}}
serve: {{python: {python}, port: {port}}}
rollout: {{prompts: 8, samples: 4}}
reward: {{name: "tests.e2e.rewards:Checksum"}}
train: {{steps: 1, updates: 2}}
evaluation: {{every: 1, prompts: 8}}
"""
NAME = "cpu-jackpot-sglang"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A run of one step that goes on to a second; what it exported after the first is in runs/first."""
    place = Workplace(tmp_path_factory.mktemp("decoupled"))
    names = {"examples": REPOSITORY / "examples" / "configs", "python": PYTHON, "port": free_port()}
    (place.root / "config.yaml").write_text(CONFIG.format(**names))
    write_model(place.root / "small", num_hidden_layers=2)
    succeed(place.mtroll("demo", "runs/demo"))
    serving = place.start("serve", "config.yaml")
    try:
        succeed(place.mtroll("train", "config.yaml"))
        shutil.copytree(place.run(NAME) / "hf-rollout", place.run("first"))
        succeed(place.mtroll("train", "config.yaml", "resume=true", "train.steps=2"))
        yield place
    finally:
        serving.send_signal(signal.SIGTERM)
        finish(serving)


def test_the_server_draws_from_the_rollout_model_as_it_was_trained(trained: Workplace) -> None:
    """Its log-probs are those of Hugging Face's forward, at first of the folder that it began with, then of
    the first step's export; the two models are not the same."""
    steps = [trained.run(NAME) / "rollouts" / f"step_{step:06d}.0-of-1.jsonl.gz" for step in (1, 2)]
    began, first = trained.root / "small", trained.run("first")
    assert largest_gap(began, steps[0]) < 2e-4
    assert largest_gap(first, steps[1]) < 2e-4
    assert largest_gap(began, steps[1]) > 1e-3


def test_both_learn_and_servers_have_the_trainers_weights_after_each_step(trained: Workplace) -> None:
    rows = trained.metrics(NAME)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["servers"] == 1 and row["engine_kl"] < 1e-6 for row in rows)
    for row in rows[1:]:
        assert row["skipped_updates"] == row["rollout_model_skipped"] == 0
        assert row["grad_norm"] > 0
        assert row["rollout_model_grad_norm"] > 0
        assert row["rollout_trainer_kl"] > 0.01  # another model than the policy samples
        assert row["version_age"] == 0


def test_the_policy_is_what_is_evaluated_and_exported(trained: Workplace) -> None:
    folder = trained.run(NAME)
    layers = {
        name: json.loads((folder / name / "config.json").read_text())["num_hidden_layers"]
        for name in ("hf", "hf-rollout")
    }
    assert layers == {"hf": 4, "hf-rollout": 2}
    assert all(0 <= row["held_out_success"] <= 1 for row in trained.metrics(NAME))
