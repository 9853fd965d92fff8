"""Build the policy, load its weights and, if it is trained, make its optimizer."""

from collections.abc import Callable

from megatron_troll.config import Model
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.parallel.groups import Groups
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource, open_checked


def open_policy(
    model: Model, shape: ModelShape, groups: Groups, seed: int, updates: int, progress: Callable[[], object]
) -> Trainable:
    """The model to train, with its weights and its optimizer for `updates` steps. See MegatronModel for
    `progress`."""
    built = open_model(model, shape, groups, seed, progress, trained=True)
    return trainable(built, model.optimizer, updates)


def open_model(
    model: Model,
    shape: ModelShape,
    groups: Groups,
    seed: int,
    progress: Callable[[], object],
    *,
    trained: bool = False,
) -> MegatronModel:
    """The model with its weights; it has gradient buffers only if `trained`. See MegatronModel for
    `progress`. Blocks on every rank."""
    built = build(model, shape, groups, trained=trained, progress=progress)
    random = model.init == "random"
    load(built, RandomSource(shape, seed) if random else open_checked(model.path, shape, groups.world))
    return built
