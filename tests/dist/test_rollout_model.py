"""A rollout model gets the loss and gradients of plain autograd on every layout that it shares with its
policy, be it of another architecture, and goes on from a checkpoint to the last bit.

rollout_model_worker.py has what ranks run.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_troll.mcore.shape import shape_of
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, Unstacked
from tests.dist.harness import RankPool
from tests.dist.layouts_batch import Batch, Weights, make_batch
from tests.dist.layouts_checks import global_norm, worst_gradient
from tests.dist.layouts_reference import Tokens, read, tokens_of
from tests.dist.parameters import unshard
from tests.dist.rollout_model_worker import (
    KEPT,
    WEIGHT,
    Cut,
    Pupil,
    Seen,
    learn,
    resume,
    save_and_go_on,
    taught,
)
from tests.dist.tiny import DENSE, MOE, reference

TOLERANCE = 1e-5
SMALL = DENSE | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40}
FEW = MOE | {"num_hidden_layers": 2, "num_experts": 4, "hidden_size": 32}
CUTS = {
    "one-rank": (1, "dense", Cut({}, {}, token_budget=96, packed=False)),
    "tp2": (2, "dense", Cut({"tp": 2, "ep": 2}, {"tp": 2}, token_budget=48)),
    "tp2-experts": (2, "experts", Cut({"tp": 2, "ep": 2}, {"tp": 2, "ep": 2}, token_budget=48)),
    "dp2-experts": (2, "experts", Cut({"ep": 2}, {}, token_budget=4096)),
    "pp2": (2, "dense", Cut({"pp": 2}, {"pp": 2}, token_budget=24)),
    "cp2": (2, "dense", Cut({"cp": 2}, {"cp": 2}, token_budget=48)),
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch("moe")


@pytest.fixture(scope="module")
def pupils() -> dict[str, Pupil]:
    """Peaked heads, so that the two models disagree."""
    found = {}
    for name, config in (("dense", SMALL), ("experts", FEW)):
        weights = {key: tensor.clone() for key, tensor in reference(config, seed=3).named_parameters()}
        weights["lm_head.weight"] *= 4
        found[name] = Pupil(config, {key: tensor.detach() for key, tensor in weights.items()})
    return found


class Expected:
    """By plain autograd in float64: loss, mean KL, gradients."""

    def __init__(self, batch: Batch, pupil: Pupil) -> None:
        tokens, model = tokens_of(batch), model_of(pupil.config, pupil.weights)
        with torch.no_grad():
            teacher = read(model_of(batch.config, batch.now), batch.rollouts).logits
        student = read(model, batch.rollouts).logits
        kl = merged_kl(teacher, student, tokens)
        loss = (tokens.token_mean * (WEIGHT * kl - ppo(student, batch, tokens))).sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        source = Unstacked(TensorSource(gradients), table_of(shape_of(pupil.config)))
        self.loss, self.kl = loss.item(), float((tokens.token_mean * kl).sum())
        self.gradients = {name: source.read(name) for name in source.shapes}


def model_of(config: dict, weights: Weights) -> nn.Module:
    model = reference(config).double()
    if "num_experts" in config:
        model.set_experts_implementation("eager")  # the grouped one has no float64
    model.load_state_dict(weights)
    return model


def merged_kl(teacher: Tensor, student: Tensor, tokens: Tokens) -> Tensor:
    """[N] KL over the teacher's KEPT likeliest tokens, the sampled one, and all others as one."""
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, teacher.topk(KEPT, 1).indices, True)
    kept = kept.scatter(1, tokens.target[:, None], True)
    p, q = teacher.softmax(1), student.softmax(1)
    parts = [(x * kept, (x * ~kept).sum(1)) for x in (p, q)]
    (p_kept, p_rest), (q_kept, q_rest) = parts
    inside = torch.where(kept, p * (p_kept.clamp(min=1e-300).log() - q_kept.clamp(min=1e-300).log()), 0.0)
    return inside.sum(1) + p_rest * (p_rest.log() - q_rest.log())


def ppo(student: Tensor, batch: Batch, tokens: Tokens) -> Tensor:
    """[N] PPO's clipped score against what the engine said."""
    at = tokens.target[:, None]
    engine = torch.cat([torch.from_numpy(r.logp[r.mask > 0]) for r in batch.rollouts]).double()
    ratio = (student.log_softmax(1).gather(1, at)[:, 0] - engine).exp()
    return torch.minimum(ratio * tokens.advantage, ratio.clamp(0.8, 1.2) * tokens.advantage)


@pytest.fixture(scope="module")
def expected(batch: Batch, pupils: dict[str, Pupil]) -> dict[str, Expected]:
    return {name: Expected(batch, pupil) for name, pupil in pupils.items()}


@pytest.mark.parametrize("name", CUTS)
def test_a_layout_gives_the_loss_and_gradients_of_plain_autograd(
    name: str,
    batch: Batch,
    pupils: dict[str, Pupil],
    expected: dict[str, Expected],
    request: pytest.FixtureRequest,
) -> None:
    world, kind, cut = CUTS[name]
    wanted, pupil = expected[kind], pupils[kind]
    ranks: list[Seen] = request.getfixturevalue(f"ranks{world}").run(learn, cut, batch, pupil)
    for rank in ranks:
        assert rank.metrics["rollout_model_loss"] == pytest.approx(wanted.loss, rel=TOLERANCE)
        norm = global_norm(wanted.gradients)
        assert rank.metrics["rollout_model_grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
        assert rank.metrics["distill_kl"] == pytest.approx(wanted.kl, rel=TOLERANCE)
        assert rank.metrics["rollout_model_skipped"] == 0
        assert rank.weight == pytest.approx(WEIGHT * math.exp(0.2))  # far above the target
    worst, tensor = worst_gradient(joined(ranks, pupil), wanted.gradients)
    assert worst <= TOLERANCE, f"{tensor} differs by {worst:.1e}"


def test_distillation_shows_in_the_gradients(expected: dict[str, Expected]) -> None:
    assert all(each.kl > 0.1 for each in expected.values())


def joined(ranks: list[Seen], pupil: Pupil) -> Weights:
    """Whole tensors from the shards of all ranks; the copies of a shard must agree to the last bit."""
    found: dict[tuple[str, ...], dict[int, Tensor]] = {}
    for names, number, gradient in (shard for rank in ranks for shard in rank.gradients):
        known = found.setdefault(names, {}).setdefault(number, gradient)
        assert torch.equal(known, gradient), names
    entries = {place.names: place.entry for place in table_of(shape_of(pupil.config)).places()}
    return {
        name: tensor
        for names, parts in found.items()
        for name, tensor in zip(names, unshard(entries[names], [parts[i] for i in sorted(parts)]))
    }


def test_it_goes_on_from_a_checkpoint_to_the_last_bit(
    batch: Batch, pupils: dict[str, Pupil], ranks2: RankPool, tmp_path: Path
) -> None:
    _, kind, cut = CUTS["tp2-experts"]
    uninterrupted = ranks2.run(save_and_go_on, cut, batch, pupils[kind], str(tmp_path))
    assert ranks2.run(resume, cut, batch, pupils[kind], str(tmp_path)) == uninterrupted
    other = Cut({}, {}, token_budget=4096)
    moved = ranks2.run(resume, other, batch, pupils[kind], str(tmp_path))
    np.testing.assert_allclose(moved[0], uninterrupted[0], rtol=1e-4)


def test_the_policy_reads_a_rollout_once_for_all_epochs(
    batch: Batch, pupils: dict[str, Pupil], ranks2: RankPool
) -> None:
    _, kind, _ = CUTS["tp2-experts"]
    cut = Cut({}, {}, token_budget=48, epochs=2)
    read = [i for rank in ranks2.run(taught, cut, batch, pupils[kind]) for i in rank]
    assert sorted(read) == list(range(len(batch.rollouts)))
