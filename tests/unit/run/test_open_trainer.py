"""What the policy's trainer takes of the configuration."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_troll.config import Config
from megatron_troll.objectives import compose
from megatron_troll.run.run import open_trainer


@pytest.mark.parametrize("chunk", [None, 512])
def test_the_head_has_the_chunk_and_the_temperature_of_the_run(chunk: int | None) -> None:
    config = Config.model_validate(
        {
            "name": "x",
            "models": {"policy": {"path": "p"}},
            "rollout": {"sampling": {"temperature": 0.5}},
            "train": {"head_chunk": chunk},
        }
    )
    task: Any = SimpleNamespace(config=config, objective=compose(config.objective))
    policy: Any = SimpleNamespace(model="the policy")
    head = open_trainer(task, policy).head
    assert (head.model, head.temperature, head.chunk) == ("the policy", 0.5, chunk)
