"""Routers: loads that no layout changes, balancing by biases, frozen weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_troll.config import Layout, Model, MoE, Optimizer
from megatron_troll.observe.experts import expert_metrics
from tests.dist.experts_worker import Loads, Routed, route, run_steps
from tests.dist.harness import RankPool
from tests.dist.layouts_batch import Batch, make_batch
from tests.dist.tiny import MOE

EXPERTS, CHOSEN, LAYERS = MOE["num_experts"], MOE["num_experts_per_tok"], MOE["num_hidden_layers"]
RATE, STEPS = 0.02, 6
# Weights that hardly move: what moves the loads is the bias.
STILL = Optimizer(lr=1e-12, distributed=False)
LAYOUTS = {
    "ep2": (2, {"ep": 2}, {}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}, {"recompute": "full"}),
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Of ten different tokens, so that some experts get most of them."""
    whole = make_batch("moe")
    few = [replace(r, prompt_ids=r.prompt_ids % 10, response_ids=r.response_ids % 10) for r in whole.rollouts]
    return replace(whole, rollouts=few)


def model(layout: dict[str, int], moe: MoE, **fields: Any) -> Model:
    tree = {"path": "none", "dtype": "fp32", "layout": Layout(**layout), "optimizer": STILL, "moe": moe}
    return Model.model_validate(tree | fields)


@pytest.fixture(scope="module")
def alone(ranks1: RankPool, batch: Batch) -> Routed:
    (result,) = ranks1.run(run_steps, model({}, MoE(bias_rate=RATE)), batch, STEPS)
    return result


def test_every_token_of_every_layer_is_counted_once(alone: Routed, batch: Batch) -> None:
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in batch.rollouts)
    for loads in alone.loads:
        assert list(loads) == list(range(LAYERS))
        assert all(int(load.sum()) == CHOSEN * tokens for load in loads.values())


def test_biases_move_against_the_load_and_even_it_out(alone: Routed) -> None:
    expected = {layer: torch.zeros(EXPERTS) for layer in range(LAYERS)}
    for loads, biases in zip(alone.loads, alone.biases):
        for layer, load in loads.items():
            expected[layer] += RATE * (load.double().mean() - load).sign().float()
            assert torch.equal(biases[layer], expected[layer])
    first, last = (expert_metrics(alone.loads[step]) for step in (0, -1))
    assert first["expert_load_max"] > 3
    assert last["expert_load_max"] < 2.5
    for layer in range(LAYERS):
        assert last[f"expert_load_max/layer_{layer}"] < first[f"expert_load_max/layer_{layer}"]
        assert last[f"expert_entropy/layer_{layer}"] > first[f"expert_entropy/layer_{layer}"] + 0.02


@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_and_biases_are_the_same_on_every_layout(
    name: str, alone: Routed, batch: Batch, request: pytest.FixtureRequest
) -> None:
    world, layout, fields = LAYOUTS[name]
    config = model(layout, MoE(bias_rate=RATE), **fields)
    results = request.getfixturevalue(f"ranks{world}").run(run_steps, config, batch, 3)
    for result in results:
        for loads, wanted in zip(result.loads, alone.loads):
            assert equal(loads, wanted)
        for biases, wanted in zip(result.biases, alone.biases):
            assert equal(biases, {layer: wanted[layer] for layer in biases})
    assert sorted(layer for r in results[:: world // layout.get("pp", 1)] for layer in r.biases[0]) == list(
        range(LAYERS)
    )


def test_counts_are_exact_in_bf16(ranks1: RankPool, batch: Batch) -> None:
    """More tokens than bf16 can count one by one."""
    (result,) = ranks1.run(run_steps, model({}, MoE(bias_rate=RATE), dtype="bf16"), batch, 3)
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in batch.rollouts)
    for loads in result.loads:
        assert all(int(load.sum()) == CHOSEN * tokens for load in loads.values())
    assert all(bias.dtype == torch.float32 for bias in result.biases[-1].values())


def test_a_frozen_router_keeps_its_weights_and_all_else_moves(ranks2: RankPool, batch: Batch) -> None:
    moving = Optimizer(lr=1e-2, weight_decay=0.1)
    config = model({"ep": 2}, MoE(freeze_router=True), optimizer=moving)
    for result in ranks2.run(run_steps, config, batch, 1):
        for name, weight in result.after.items():
            frozen = name.endswith("mlp.gate.weight")
            assert torch.equal(weight, result.before[name]) == frozen, name


@pytest.mark.parametrize("norm_topk", [True, False])
def test_a_bias_changes_the_choice_and_not_the_weights_of_the_chosen(
    ranks1: RankPool, norm_topk: bool
) -> None:
    sizes = MOE | {"norm_topk_prob": norm_topk}
    logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-0.3, 0.3, EXPERTS)
    plain, biased = model({}, MoE()), model({}, MoE(bias_rate=RATE))
    (without,) = ranks1.run(route, logits, None, plain, sizes)
    (at_zero,) = ranks1.run(route, logits, torch.zeros(EXPERTS), biased, sizes)
    (with_bias,) = ranks1.run(route, logits, bias, biased, sizes)
    assert torch.equal(without[1], at_zero[1])
    torch.testing.assert_close(without[0], at_zero[0])
    probs, chosen = with_bias
    assert torch.equal(chosen, top(logits.softmax(1) + bias))
    assert not torch.equal(chosen, without[1])
    shares = logits.softmax(1) * chosen
    torch.testing.assert_close(probs, shares / shares.sum(1, keepdim=True) if norm_topk else shares)


def top(scores: Tensor) -> Tensor:
    chosen = scores.topk(CHOSEN, 1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def equal(left: Loads, right: Loads) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
