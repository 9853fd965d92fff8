"""A critic gives the values and gradients of plain autograd on every layout, lives on another layout than its
policy, and shares a checkpoint with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import Rollout
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, Unstacked
from megatron_troll.weights.value import VALUE_HEAD
from tests.dist.critic_worker import (
    Seen,
    Shard,
    Sizes,
    Task,
    resume,
    run_beside,
    run_critic,
    save_then_continue,
    table,
)
from tests.dist.harness import RankPool
from tests.dist.layouts_batch import Weights
from tests.dist.layouts_checks import global_norm, worst_gradient
from tests.dist.methods_batch import Batch, make_methods_batch, model_of
from tests.dist.methods_worker import Cut
from tests.dist.parameters import unshard
from tests.dist.tiny import MOE, reference

TOLERANCE = 1e-5
LAYOUTS = {
    "one-rank": (1, Cut({}, packed=False, token_budget=96)),
    "tp2-ep2": (2, Cut({"tp": 2, "ep": 2}, packed=True, token_budget=48)),
    "tp2-etp2-padded": (2, Cut({"tp": 2, "etp": 2}, packed=False, token_budget=96)),
    "pp2": (2, Cut({"pp": 2}, packed=True, token_budget=24)),
    "cp2": (2, Cut({"cp": 2}, packed=True, token_budget=48)),
    "dp2": (2, Cut({}, packed=False, token_budget=48)),
    "tp2-pp2-ep2": (4, Cut({"tp": 2, "pp": 2, "ep": 2}, packed=True, token_budget=48)),
}
APART = Sizes(policy={"tp": 2, "ep": 2}, critic={})
SWAPPED = Sizes(policy={}, critic={"tp": 2, "ep": 2})


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_methods_batch()


@pytest.fixture(scope="module")
def task(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A critic with the body of the weights `now`."""
    folder = tmp_path_factory.mktemp("body")
    body = reference(MOE)
    body.load_state_dict(batch.now)
    body.save_pretrained(folder)
    head = torch.randn(1, MOE["hidden_size"], generator=torch.Generator().manual_seed(0))
    targets = [advantage.astype(np.float32) for advantage in batch.token_advantages]
    return Task(batch.rollouts, targets, str(folder), head)


class Expected:
    """values [L], loss and gradients, by plain autograd in float64."""

    def __init__(self, batch: Batch, task: Task) -> None:
        model, head = model_of(batch.now), task.head.double().requires_grad_()
        values = torch.cat([hidden(model, rollout) for rollout in task.rollouts]) @ head[0]
        told = [target[r.mask > 0] for target, r in zip(task.targets, task.rollouts)]
        loss = (values - torch.from_numpy(np.concatenate(told)).double()).square().mean() / 2
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        source = Unstacked(TensorSource(gradients), table_of(shape_of(MOE)))
        assert head.grad is not None
        self.values, self.loss = values.detach(), loss.item()
        self.gradients = {name: source.read(name) for name in source.shapes} | {VALUE_HEAD: head.grad}


def hidden(model: torch.nn.Module, rollout: Rollout) -> Tensor:
    """[n, h] where the n loss tokens are predicted."""
    ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])[:-1]
    states = model.model(ids[None]).last_hidden_state[0]
    return states[len(rollout.prompt_ids) - 1 :][torch.from_numpy(rollout.mask) > 0]


@pytest.fixture(scope="module")
def expected(batch: Batch, task: Task) -> Expected:
    return Expected(batch, task)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_values_and_gradients_of_plain_autograd(
    layout: str, task: Task, expected: Expected, request: pytest.FixtureRequest
) -> None:
    world, cut = LAYOUTS[layout]
    ranks: list[Seen] = request.getfixturevalue(f"ranks{world}").run(run_critic, cut, task)
    for rank in ranks:
        check_values(rank.values, expected.values)
        assert rank.metrics == {
            "critic_loss": pytest.approx(expected.loss, rel=TOLERANCE),
            "critic_grad_norm": pytest.approx(global_norm(expected.gradients), rel=TOLERANCE),
            "critic_skipped": 0,
        }
    worst, name = worst_gradient(joined([rank.gradients for rank in ranks]), expected.gradients)
    assert worst <= TOLERANCE, f"{name} differs by {worst:.1e}"


def check_values(values: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(values.double(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


def joined(ranks: list[list[Shard]]) -> Weights:
    """Whole tensors from the shards of all ranks; the copies of a shard must agree to the last bit."""
    found: dict[tuple[str, ...], dict[int, Tensor]] = {}
    for names, number, gradient in (shard for rank in ranks for shard in rank):
        known = found.setdefault(names, {}).setdefault(number, gradient)
        assert torch.equal(known, gradient), names
    entries = {place.names: place.entry for place in table().places()}
    return {
        name: tensor
        for names, parts in found.items()
        for name, tensor in zip(names, unshard(entries[names], [parts[i] for i in sorted(parts)]))
    }


@pytest.mark.parametrize("sizes", [APART, SWAPPED], ids=["policy-tp2", "critic-tp2"])
def test_a_critic_of_another_layout_leaves_its_policy_alone(
    sizes: Sizes, batch: Batch, task: Task, expected: Expected, ranks2: RankPool
) -> None:
    for rank in ranks2.run(run_beside, sizes, batch, task):
        assert rank.critic_sizes == (sizes.critic.get("tp", 1), 2 // sizes.critic.get("tp", 1))
        check_values(rank.values, expected.values)
        assert rank.before == rank.after


def test_a_checkpoint_holds_both_and_moves_both_to_other_layouts(
    batch: Batch, task: Task, ranks2: RankPool, tmp_path: Path
) -> None:
    uninterrupted = ranks2.run(save_then_continue, APART, batch, task, str(tmp_path))
    assert ranks2.run(resume, APART, batch, task, str(tmp_path)) == uninterrupted
    moved = ranks2.run(resume, SWAPPED, batch, task, str(tmp_path))
    np.testing.assert_allclose(moved[0], uninterrupted[0], rtol=TOLERANCE)
