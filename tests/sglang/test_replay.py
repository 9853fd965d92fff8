"""Training with `train.replay: rollout` on the experts that a real server returns. The model's routers leave
the choice to rounding, so that the trainer alone would often choose other experts than the server. Without a
prefix cache, in which samples of one prompt share one record though each was read by a forward of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.workplace import REPOSITORY, Workplace, succeed
from tests.sglang.farm import Farm
from tests.sglang.model import CONFIG as SIZES
from tests.sglang.model import write_model

CONFIG = """
extends: {examples}/cpu_sglang.yaml
models: {{policy: {{path: model}}}}
rollout: {{prompts: 8, samples: 4, sglang: {{servers: ["{url}"], probe: {{prompts: 0}}}}}}
serve: {{routed_experts: true, flags: {{disable-radix-cache: true}}}}
reward: {{name: "tests.e2e.rewards:Overlap"}}
train: {{steps: 2, updates: 2}}
evaluation: {{every: 0, prompts: 4}}
checkpoint: {{export: false}}
"""


@pytest.fixture
def place(farm: Farm, tmp_path: Path) -> Iterator[Workplace]:
    place = Workplace(tmp_path)
    undecided(write_model(tmp_path / "model"))
    server = farm.start(
        tmp_path / "model", enable_return_routed_experts=True, disable_radix_cache=True
    ).wait_until_healthy()
    text = CONFIG.format(examples=REPOSITORY / "examples" / "configs", url=server.url)
    (tmp_path / "config.yaml").write_text(text)
    succeed(place.mtroll("demo", "runs/demo"))
    yield place
    server.kill()


def undecided(folder: Path) -> None:
    """Each router scores all experts of a half alike, but for what rounding makes of it."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("mlp.gate.weight"):
            half = SIZES["num_experts"] // 2
            alike = weight[::half].repeat_interleave(half, 0)
            weights[name] = alike * (1 + 1e-7 * torch.randn(weight.shape, generator=generator))
    save_file(weights, file, metadata={"format": "pt"})


def test_the_trainer_repeats_the_servers_choices(place: Workplace) -> None:
    succeed(place.mtroll("train", "config.yaml", "name=replayed", "train.replay=rollout"))
    succeed(place.mtroll("train", "config.yaml", "name=alone", "train.steps=1"))
    _, first, second = place.metrics("replayed")
    assert first["replay_changed"] > 0.01
    assert first["replay_left_out"] == 0
    assert first["rollout_trainer_gap/max"] < 1e-4
    assert second["rollout_trainer_gap/max"] < 1e-4
    assert place.metrics("alone")[1]["rollout_trainer_gap/max"] > 1e-2
