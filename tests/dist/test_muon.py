"""Muon gives the update of the dense formula on every layout, and its state survives a change of layout."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_troll.config import Layout, LearningRateSchedule, Model, Optimizer
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import Groups
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS, Sizes
from tests.dist.layouts_worker import gradients_as_parameters, streamed
from tests.dist.muon_reference import Dense, Weights
from tests.dist.parameters import constants_of, main_gradient, trained_parameters
from tests.dist.tiny import DENSE, MOE, NEXT, reference, started
from tests.dist.tiny_families import APERTUS, QWEN2

LR, DECAY, LIMIT, STEPS = 0.5, 0.1, 1.0, 3
TIED = DENSE | {"tie_word_embeddings": True}
# dtype, whether the state is sharded, the largest error of a tensor's change beside its norm.
KINDS = {"fp32": ("fp32", False, 1e-5), "bf16": ("bf16", False, 1e-2), "sharded": ("bf16", True, 1e-2)}
CASES = {
    **{
        f"{layout}-{kind}": (*LAYOUTS[layout], MOE, kind)
        for layout in LAYOUTS
        for kind in KINDS
        if (layout, kind) != ("tp2", "sharded")
    },
    "hybrid-tp2-ep2": (2, {"tp": 2, "ep": 2}, NEXT, "fp32"),
    "hybrid-tp2-sharded": (4, {"tp": 2}, NEXT, "sharded"),
    "tied-pp2": (2, {"pp": 2}, TIED, "fp32"),
    "tied-pp2-sharded": (4, {"pp": 2}, TIED, "sharded"),
    "apertus-tp2": (2, {"tp": 2}, APERTUS, "fp32"),
    "qwen2-tp2": (2, {"tp": 2}, QWEN2, "fp32"),
}


@pytest.mark.parametrize(("world", "sizes", "config", "kind"), CASES.values(), ids=CASES)
def test_an_update_is_that_of_the_dense_formula(
    world: int, sizes: Sizes, config: dict[str, Any], kind: str, request: pytest.FixtureRequest
) -> None:
    dtype, distributed, tolerance = KINDS[kind]
    pool = request.getfixturevalue(f"ranks{world}")
    results = pool.run(run, config, sizes, dtype, distributed)
    gradients, _, _ = results[0]
    dense = Dense({name: tuple(g.shape) for name, g in gradients[0].items()}, LR, DECAY)
    norms = [dense.step(each, LIMIT) for each in gradients]
    for _, weights, found in results:
        assert found == pytest.approx(norms, rel=1e-4 if dtype == "fp32" else 1e-2)
        errors = {
            name: float((weights[name].double() - wanted).norm() / wanted.norm())
            for name, wanted in dense.weights.items()
        }
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= tolerance, (worst, errors[worst])


def test_experts_on_more_ranks_than_dense_weights_are_refused(ranks2: RankPool) -> None:
    """Megatron would shard nothing there, and update experts from a part of their gradient."""
    ranks2.run(check_refused)


def check_refused() -> None:
    with (
        started(Layout(tp=2)) as groups,
        pytest.raises(ValueError, match=r"optimizer.name=muon .* set optimizer.distributed=false"),
    ):
        made(MOE, groups, {"tp": 2}, "bf16", distributed=True)


def run(
    config: dict[str, Any], sizes: Sizes, dtype: str, distributed: bool
) -> tuple[list[Weights], Weights, list[float]]:
    """The gradients of each step, the weights after the last, and the norms that were reported."""
    with started(Layout(**sizes)) as groups:
        policy = made(config, groups, sizes, dtype, distributed)
        published = reference(config).state_dict()
        load(policy.model, TensorSource({name: torch.zeros_like(t) for name, t in published.items()}))
        policy.optimizer.reload_model_params()
        gradients, norms = [], []
        for step in range(STEPS):
            gradients.append(give_gradients(policy.model, published, step))
            norms.append(policy.step())
        return gradients, streamed(policy.model), norms


def made(config: dict[str, Any], groups: Groups, sizes: Sizes, dtype: str, distributed: bool) -> Trainable:
    optimizer = Optimizer(
        name="muon",
        lr=LR,
        betas=(0.9, 0.99),
        weight_decay=DECAY,
        grad_norm=LIMIT,
        distributed=distributed,
        schedule=LearningRateSchedule(decay="constant"),
    )
    model = Model.model_validate(
        {"path": "none", "dtype": dtype, "layout": Layout(**sizes), "optimizer": optimizer}
    )
    return trainable(build(model, shape_of(config), groups), optimizer, total_steps=10)


def give_gradients(model: MegatronModel, published: Weights, step: int) -> Weights:
    """Random gradients, of which every data-parallel rank accumulated an equal part; returns them whole, as
    published."""
    generator = torch.Generator().manual_seed(step)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in published.items()}
    with gradients_as_parameters(model):
        load(model, TensorSource(drawn))
        whole = {
            name: tensor for name, tensor in streamed(model).items() if name not in constants_of(model.shape)
        }
    experts = parallel_state.get_expert_data_parallel_world_size()
    for parameter in trained_parameters(model):
        is_expert = not getattr(parameter, "allreduce", True)
        main_gradient(parameter).div_(experts if is_expert else model.groups.dp_cp.size)
    for chunk in model.chunks:
        assert isinstance(chunk, DistributedDataParallel)
        chunk.finish_grad_sync()
    return whole
