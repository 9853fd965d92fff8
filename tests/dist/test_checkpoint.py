"""Checkpoints of real Megatron models: resumed runs equal uninterrupted ones, on any layout."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_troll.config import Layout
from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from tests.dist.checkpoint_run import (
    STEPS,
    Run,
    Step,
    Weights,
    fill,
    made,
    train,
    train_step,
    training,
    values_of,
)
from tests.dist.harness import RankPool
from tests.dist.tiny import DENSE, MOE, NEXT, reference, started

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "alone": (1, {}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "dp2": (2, {}),
}
# Every layout is written and read by another, and those with different optimizer chains both ways.
MOVES = [
    ("alone", "tp2-ep2"),
    ("tp2-ep2", "pp2"),
    ("pp2", "pp2-vpp2"),
    ("pp2-vpp2", "ep2"),
    ("ep2", "dp2"),
    ("dp2", "alone"),
    ("tp2-ep2", "dp2"),
    ("dp2", "ep2"),
]
Saved = dict[str, tuple[str, list[Step]]]


@pytest.fixture(scope="module")
def moe() -> Weights:
    return dict(reference(MOE).state_dict())


def on(request: pytest.FixtureRequest, world: int) -> RankPool:
    return request.getfixturevalue(f"ranks{world}")


@pytest.fixture(scope="module")
def saved(moe: Weights, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Saved:
    """layout -> (folder with a checkpoint, the steps that followed it without interruption)."""
    made = {}
    for name, (world, sizes) in LAYOUTS.items():
        folder = str(tmp_path_factory.mktemp(name))
        made[name] = folder, on(request, world).run(save_then_continue, Run(moe, sizes, MOE), folder)[0]
    return made


def save_then_continue(run: Run, folder: str) -> list[Step]:
    with training(run) as trained:
        train(trained, 0)
        Checkpoints(folder, {"policy": trained}).save(10, {"position": 3})
        return train(trained, STEPS)


def resume(run: Run, folder: str) -> list[Step]:
    with training(run) as trained:
        train_step(trained, 99)  # whatever a load leaves as it was shows in the next steps
        fill(trained, 1.0)
        assert Checkpoints(folder, {"policy": trained}).load() == {"position": 3}
        return train(trained, STEPS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    layout: str, moe: Weights, saved: Saved, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    folder, uninterrupted = saved[layout]
    assert on(request, world).run(resume, Run(moe, sizes, MOE), folder)[0] == uninterrupted


@pytest.mark.parametrize(("before", "after"), MOVES)
def test_a_run_continues_on_another_layout(
    before: str, after: str, moe: Weights, saved: Saved, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[after]
    folder, uninterrupted = saved[before]
    resumed = on(request, world).run(resume, Run(moe, sizes, MOE), folder)[0]
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-5)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_resumes_bitwise_from_its_fp32_masters(
    distributed: bool, moe: Weights, ranks2: RankPool, tmp_path: Path
) -> None:
    run = Run(moe, {"tp": 2, "ep": 2}, MOE, "bf16", distributed)
    uninterrupted = ranks2.run(save_then_continue, run, str(tmp_path))[0]
    assert ranks2.run(resume, run, str(tmp_path))[0] == uninterrupted


@pytest.mark.parametrize("distributed", [False, True])
def test_plain_and_distributed_optimizers_read_each_other_on_another_layout(
    distributed: bool, moe: Weights, ranks2: RankPool, tmp_path: Path
) -> None:
    before = Run(moe, {"tp": 2, "ep": 2}, MOE, distributed=distributed)
    after = replace(before, sizes={"pp": 2}, distributed=not distributed)
    uninterrupted = ranks2.run(save_then_continue, before, str(tmp_path))[0]
    resumed = ranks2.run(resume, after, str(tmp_path))[0]
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "dtype", "distributed"),
    [({"tp": 2, "ep": 2}, "bf16", True), ({"pp": 2}, "bf16", True), ({"tp": 2}, "fp32", False)],
)
def test_muon_resumes_bitwise(
    sizes: dict[str, int], dtype: str, distributed: bool, moe: Weights, ranks4: RankPool, tmp_path: Path
) -> None:
    run = Run(moe, sizes, MOE, dtype, distributed, "muon")
    uninterrupted = ranks4.run(save_then_continue, run, str(tmp_path))[0]
    assert ranks4.run(resume, run, str(tmp_path))[0] == uninterrupted


@pytest.mark.parametrize(
    ("before", "after", "distributed"),
    [({"tp": 2, "ep": 2}, {"pp": 2}, True), ({"pp": 2}, {"tp": 2, "etp": 2}, False)],
)
def test_muon_continues_on_another_layout(
    before: dict[str, int],
    after: dict[str, int],
    distributed: bool,
    moe: Weights,
    ranks2: RankPool,
    ranks4: RankPool,
    tmp_path: Path,
) -> None:
    """From matrices shared out over ranks to every rank holding them all, in bf16, and back; in fp32, where
    nothing is shared out, to the digits that a layout moves."""
    dtype, tolerance = ("bf16", 1e-2) if distributed else ("fp32", 1e-5)
    run = Run(moe, before, MOE, dtype, distributed, "muon")
    uninterrupted = ranks4.run(save_then_continue, run, str(tmp_path))[0]
    moved = replace(run, sizes=after, distributed=False)
    np.testing.assert_allclose(ranks2.run(resume, moved, str(tmp_path))[0], uninterrupted, rtol=tolerance)


def test_the_state_of_another_optimizer_is_refused(moe: Weights, ranks2: RankPool, tmp_path: Path) -> None:
    run = Run(moe, {"pp": 2}, MOE, "bf16")
    ranks2.run(save_then_continue, run, str(tmp_path))
    told = ranks2.run(refused, replace(run, optimizer="muon"), str(tmp_path))
    assert all("for optimizer.name: adamw, this run has muon" in text for text in told)


def refused(run: Run, folder: str) -> str:
    with training(run) as trained, pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, {"policy": trained}).load()
    return str(caught.value)


def test_tied_embeddings_are_resharded(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    config = DENSE | {"tie_word_embeddings": True}
    run = Run(dict(reference(config).state_dict()), {"pp": 2}, config)
    uninterrupted = ranks2.run(save_then_continue, run, str(tmp_path))[0]
    resumed = ranks1.run(resume, replace(run, sizes={}), str(tmp_path))[0]
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-5)


HYBRID_MOVES = [({"tp": 2, "ep": 2}, {}), ({"pp": 2}, {"tp": 2, "etp": 2}), ({"ep": 2}, {"pp": 2, "vpp": 2})]


@pytest.mark.parametrize(("before", "after"), HYBRID_MOVES)
def test_a_hybrid_continues_on_another_layout(
    before: dict[str, int], after: dict[str, int], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Whose projections of linear attention are several matrices below each other, each cut apart."""
    run = Run(dict(reference(NEXT).state_dict()), before, NEXT)
    uninterrupted = on(request, 2).run(save_then_continue, run, str(tmp_path))[0]
    resumed = on(request, 2 if after else 1).run(resume, replace(run, sizes=after), str(tmp_path))[0]
    np.testing.assert_allclose(resumed, uninterrupted, rtol=1e-5)


def test_two_models_share_a_checkpoint(moe: Weights, ranks2: RankPool, tmp_path: Path) -> None:
    policy = Run(moe, {"pp": 2}, MOE)
    critic = Run(dict(reference(DENSE).state_dict()), {"pp": 2}, DENSE)
    assert ranks2.run(save_and_load_two, policy, critic, str(tmp_path)) == [[{2.0}, {3.0}]] * 2


def save_and_load_two(policy: Run, critic: Run, folder: str) -> list[set[float]]:
    with started(Layout(**policy.sizes)) as groups:
        models = {"policy": made(policy, groups), "critic": made(critic, groups)}
        fill(models["policy"], 2.0)
        fill(models["critic"], 3.0)
        Checkpoints(folder, models).save(1, {})
        for model in models.values():
            fill(model, 0.0)
        Checkpoints(folder, models).load()
        return [values_of(model) for model in models.values()]


def test_a_checkpoint_before_the_first_step_changes_no_weight(
    moe: Weights, ranks2: RankPool, tmp_path: Path
) -> None:
    runs = ranks2.run(save_untrained, Run(moe, {"tp": 2, "ep": 2}, MOE), str(tmp_path))
    assert all(saving == not_saving for saving, not_saving in runs)


def save_untrained(run: Run, folder: str) -> tuple[list[Step], list[Step]]:
    with training(run) as trained:
        Checkpoints(folder, {"policy": trained}).save(0, {})
        saving = train(trained, 0)
    with training(run) as trained:
        return saving, train(trained, 0)


def test_generators_continue_on_the_same_layout_only(moe: Weights, ranks2: RankPool, tmp_path: Path) -> None:
    run = Run(moe, {"pp": 2}, MOE)
    drawn = ranks2.run(save_and_draw, run, str(tmp_path))
    assert drawn[0] != drawn[1]
    assert ranks2.run(load_and_draw, run, str(tmp_path)) == drawn
    assert ranks2.run(load_and_draw, replace(run, sizes={"ep": 2}), str(tmp_path)) != drawn


def save_and_draw(run: Run, folder: str) -> list[float]:
    with training(run) as trained:
        rank = trained.model.groups.world.rank
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        draw()
        Checkpoints(folder, {"policy": trained}).save(1, {})
        return draw()


def load_and_draw(run: Run, folder: str) -> list[float]:
    with training(run) as trained:
        Checkpoints(folder, {"policy": trained}).load()
        return draw()


def draw() -> list[float]:
    return [random.random(), np.random.normal(), torch.randn(()).item()]
