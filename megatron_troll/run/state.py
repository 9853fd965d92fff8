"""The state of a run, as its checkpoints keep it."""

import json
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_troll.config import Natural, NonNegative
from megatron_troll.mcore.checkpoint_folder import MANIFEST
from megatron_troll.mcore.checkpoint_manifest import damaged


class Levels(TypedDict):
    """The state of a source with levels: [batch, prompts drawn before] of each rise, and the success of its
    last prompts."""

    rises: list[Annotated[list[Natural], Field(min_length=2, max_length=2)]]
    recent: list[float]


@dataclass(frozen=True, config={"extra": "forbid", "strict": True})
class TrainState:
    """State of a run: rollout batches trained on, prompts used, seconds spent, consecutive batches with
    skipped updates, held-out success before training and at the last evaluation, the rollout model's
    distillation weight for the next batch (None: the configured one), and the levels of sources
    (data/curriculum.py)."""

    step: Natural = 0
    position: Natural = 0
    seconds: NonNegative = 0.0
    skipped: Natural = 0
    before: float | None = None
    after: float | None = None
    distill_weight: NonNegative | None = None
    levels: dict[str, Levels] = field(default_factory=dict)


def read_state(checkpoint: Path, manifest: dict[str, Any]) -> TrainState:
    """The state of a run in the manifest of a checkpoint. Raises CheckpointError if it is damaged."""
    try:
        state = TypeAdapter(TrainState).validate_json(json.dumps(manifest["state"]))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["state", *map(str, first["loc"])])
        raise damaged(
            checkpoint / MANIFEST, f"does not say what it must: {where}: {first['msg'].lower()}"
        ) from None
    if state.step != manifest["step"]:
        raise damaged(checkpoint / MANIFEST, f"has step {manifest['step']} and a state of step {state.step}")
    return state
