"""The models of a run as a plan sees them: shape, weight table, and what each rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_troll.config import Config, ConfigError, Model
from megatron_troll.config.load import PRESETS
from megatron_troll.launch.plan.parameters import Holding
from megatron_troll.launch.plan.ranks import Ranks
from megatron_troll.launch.plan.states import Buffers, States, buffers_of, frozen_states, trained_states
from megatron_troll.mcore.layout import check_layout, check_world
from megatron_troll.mcore.options import check_options
from megatron_troll.mcore.shape import ModelShape, read_shape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.quantised import refuse_settings
from megatron_troll.weights.value import value_table

PUBLISHED = PRESETS / "models"


@dataclass(frozen=True)
class Planned:
    """One model of a run. `name`: policy, critic, rollout or reference. Only a `trained` one has gradients
    and optimizer state."""

    name: str
    model: Model
    shape: ModelShape
    holding: Holding
    trained: bool = True

    @property
    def ranks(self) -> Ranks:
        return self.holding.ranks

    @cached_property
    def buffers(self) -> list[list[Buffers]]:
        return buffers_of(self.model, self.holding)

    def states(self, rank: int) -> States:
        if self.trained:
            return trained_states(self.model, self.ranks, self.buffers, rank)
        return frozen_states(self.model, self.holding, self.ranks.stage(rank))


def models_of(config: Config, world: int) -> list[Planned]:
    """The models of a run, the policy first. Raises ConfigError naming the key that does not fit."""
    policy = _from_path("policy", config.policy, world)
    found = [policy]
    if config.models.reference is not None:
        found.append(replace(policy, name="reference", trained=False))
    if config.models.critic is not None:
        found.append(_from_path("critic", config.models.critic, world))
    if config.models.rollout is not None:
        found.append(_from_path("rollout", config.models.rollout, world))
    return found


def drawing_of(models: Sequence[Planned]) -> Planned:
    """The model that generates the rollouts."""
    return next((planned for planned in models if planned.name == "rollout"), models[0])


def _from_path(name: str, model: Model, world: int) -> Planned:
    return planned_of(name, model, shape_at(f"models.{name}.path", model.path), world)


def shape_at(key: str, path: str) -> ModelShape:
    """The shape in the folder `path`; without such a folder, the published shape of a model of that name.
    Raises ConfigError."""
    published = PUBLISHED / Path(path).name
    folder = published if not Path(path).is_dir() and published.is_dir() else path
    try:
        shape = read_shape(folder)
        refuse_settings(Path(folder))
        return shape
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.name for file in PUBLISHED.iterdir()))
        raise ConfigError(f"{key}: {error}; without a folder, name a known model: {known}") from error
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def planned_of(name: str, model: Model, shape: ModelShape, world: int) -> Planned:
    """A model of `shape` on `world` ranks. Raises ConfigError naming the key that does not fit."""
    key = f"models.{name}.layout"
    try:
        check_layout(shape, model.layout)
        check_world(model.layout, world)
        key = f"models.{name}"
        check_options(shape, model)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    # A critic has no head, so nothing to tie.
    shape = replace(shape, tied=shape.tied and name != "critic")
    table = table_of(shape)
    if name == "critic":
        table = value_table(table, shape.hidden)
    holding = Holding(table, Ranks(model.layout, world), shape.tied, model.moe.freeze_router)
    return Planned(name, model, shape, holding)
