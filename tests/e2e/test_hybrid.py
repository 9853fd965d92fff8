"""Qwen3-Next through the commands: a warm start, then PPO with a critic and a reference of the family."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Workplace, succeed, two_steps

WARM = "runs/hybrid-warm/hf"
HEADS = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
PPO = (
    f"models.policy.path={WARM}",
    f"models.reference={{path: {WARM}}}",
    f"models.critic={{path: {WARM}, dtype: fp32, layout: {{tp: 2, etp: 2}}}}",
    "objective.advantage={name: gae}",
    "objective.kl={name: k3, beta: 0.01}",
    "train.updates=1",
    "checkpoint.export=true",
)


@pytest.fixture(scope="module")
def hybrid(demo: Workplace) -> Workplace:
    """The demo's hybrid after a short warm start, as if it had been published with prediction heads."""
    settings = ["name=hybrid-warm", "models.policy.path=runs/demo/hybrid", "sft.steps=10"]
    succeed(demo.mtroll("sft", "warm.yaml", *settings))
    add_heads(demo.root / WARM)
    return demo


def add_heads(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(load_file(file) | {"mtp.fc.weight": HEADS}, file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["mtp.fc.weight"] = file.name
    index.write_text(json.dumps(content))


def test_ppo_with_critic_and_reference(hybrid: Workplace) -> None:
    first, second = two_steps(hybrid, "hybrid", *PPO)[1:]
    assert first["reference_kl"] == pytest.approx(0, abs=1e-9)
    assert second["reference_kl"] > 1e-7
    assert all("critic_loss" in row for row in (first, second))


def test_transformers_gives_the_log_probs_of_the_rollouts(hybrid: Workplace) -> None:
    drawn = hybrid.run("hybrid") / "rollouts" / "step_000001.0-of-1.jsonl.gz"
    assert largest_gap(hybrid.root / WARM, drawn) < 1e-4


def test_an_export_has_the_untrained_tensors_of_its_start_and_says_so(hybrid: Workplace) -> None:
    run = hybrid.run("hybrid")
    (file,) = (run / "hf").glob("*.safetensors")
    assert torch.equal(load_file(file)["mtp.fc.weight"], HEADS)
    remark = f"mtp.* (prediction heads): not trained, as in {WARM} (tensors: 1)"
    assert remark in json.loads((run / "summary.json").read_text())["remarks"]
