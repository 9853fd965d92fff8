"""What test_layouts.py holds of a rank's result against plain autograd and against one rank."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_troll.training.trainer import PROBED
from tests.dist.layout_table import Sizes, expected_groups
from tests.dist.layouts_batch import Weights
from tests.dist.layouts_reference import Expected
from tests.dist.layouts_worker import Outcome, RankResult
from tests.dist.tiny import NEXT

# Which collectives an axis larger than 1 cannot do without.
COLLECTIVES = {
    "tp": {"_allgather_base_", "_reduce_scatter_base_"},
    "pp": {"send", "recv_"},
    "cp": {"_allgather_base_", "_reduce_scatter_base_"},
    "ep": {"alltoall_base_"},
    "etp": {"allgather_"},
    "dp_cp": {"allreduce_"},
}
TOLERANCE = 1e-5
STEP_TOLERANCE = 1e-3  # of a tensor's change; the division by eps magnifies rounding
SMALLEST_GRADIENT = 1e-3  # of the global norm; below it, differences are measured against this


def check_formed(result: RankResult, world: int, sizes: Sizes, config: dict[str, Any]) -> None:
    """No layout runs as another: group sizes, shard shapes, and the collectives of each axis."""
    size = expected_groups(world, sizes)
    assert result.groups == size
    check_shards(result.shapes, size, sizes.get("vpp", 1), config)
    for outcome in result.outcomes:
        for axis, operations in COLLECTIVES.items():
            seen = {operation for group, operation in outcome.collectives if group == axis}
            assert operations <= seen if size[axis] > 1 else not seen, (axis, seen)


def check_shards(
    shapes: dict[str, tuple[int, ...]], size: Sizes, chunks: int, config: dict[str, Any]
) -> None:
    hidden, width, ffn = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    heads, groups, tp = config["num_attention_heads"], config["num_key_value_heads"], size["tp"]
    rows = -(-config["vocab_size"] // tp)
    expected = {
        "linear_proj.weight": (hidden, heads * width // tp),
        "word_embeddings.weight": (rows, hidden),
        "output_layer.weight": (rows, hidden),
    }
    if config is NEXT:
        gated, key = 2 * heads, NEXT["linear_num_key_heads"] * NEXT["linear_key_head_dim"]
        linear_heads, shared = NEXT["linear_num_value_heads"], NEXT["shared_expert_intermediate_size"]
        value = linear_heads * NEXT["linear_value_head_dim"]
        expected |= {
            "linear_qkv.weight": ((gated + 2 * groups) * width // tp, hidden),
            "in_proj.weight": (2 * (key + value + linear_heads) // tp, hidden),
            "conv1d.weight": ((2 * key + value) // tp, 1, NEXT["linear_conv_kernel_dim"]),
            "A_log": (linear_heads // tp,),
            "dt_bias": (linear_heads // tp,),
            "out_norm.weight": (NEXT["linear_value_head_dim"],),
            "out_proj.weight": (hidden, value // tp),
            "shared_experts.linear_fc1.weight": (2 * shared // tp, hidden),
            "shared_experts.linear_fc2.weight": (hidden, shared // tp),
        }
    else:
        expected["linear_qkv.weight"] = ((heads + 2 * groups) * width // tp, hidden)
    expected |= {
        "linear_fc1.weight": (2 * ffn // size["etp"], hidden),
        "linear_fc2.weight": (hidden, ffn // size["etp"]),
    }
    for name, shape in shapes.items():
        assert shape == next((want for end, want in expected.items() if name.endswith(end)), shape), name
    layers = config["num_hidden_layers"] // size["pp"]
    counts = Counter(name.split(".")[-2] for name in shapes)
    assert counts["linear_qkv"] + counts["in_proj"] == layers
    experts = layers * config["num_experts"] // size["ep"]
    assert counts["linear_fc2"] == experts + (layers if config is NEXT else 0)
    if chunks > 1:
        assert {name.split(".")[0] for name in shapes} == {str(i) for i in range(chunks)}


def check_expected(result: RankResult, expected: Sequence[Expected]) -> None:
    for outcome, wanted in zip(result.outcomes, expected, strict=True):
        assert outcome.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
        if outcome.gradients:
            check_gradients(outcome.gradients, wanted.gradients)
    assert result.grad_norm == pytest.approx(global_norm(expected[-1].gradients), rel=TOLERANCE)
    check_change(result.change, expected[-1].change)


def check_equal(result: RankResult, alone: Sequence[Outcome]) -> None:
    for outcome, wanted in zip(result.outcomes, alone, strict=True):
        assert outcome.loss == pytest.approx(wanted.loss, rel=TOLERANCE)
        check_gradients(outcome.gradients, wanted.gradients)
        check_metrics(outcome.metrics, wanted.metrics)
        check_metrics(outcome.mismatch, wanted.mismatch)


def check_gradients(gradients: Weights, wanted: Weights) -> None:
    worst, name = worst_gradient(gradients, wanted)
    assert worst <= TOLERANCE, f"{name} differs by {worst:.1e}"


def check_change(change: Weights, wanted: Weights) -> None:
    assert change.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (change[name] - want).norm() <= STEP_TOLERANCE * want.norm(), name


def worst_gradient(gradients: Weights, wanted: Weights) -> tuple[float, str]:
    """The largest ||difference|| / max(||g||, SMALLEST_GRADIENT x global norm) over tensors, and whose."""
    assert gradients.keys() == wanted.keys()
    floor = SMALLEST_GRADIENT * global_norm(wanted)
    differences = {}
    for name, want in wanted.items():
        difference = (gradients[name].double() - want.double()).norm()
        differences[name] = float(difference / max(float(want.double().norm()), floor))
    assert all(map(math.isfinite, differences.values())), differences
    return max((difference, name) for name, difference in differences.items())


def global_norm(gradients: Weights) -> float:
    return float(torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm())


def check_metrics(metrics: dict[str, float], alone: dict[str, float]) -> None:
    """But for those of a sample of each micro-batch, and the solver's, which hang on the last bits."""
    assert metrics.keys() == alone.keys()
    for name in metrics:
        if name.split("/")[0] not in {*PROBED, "passes", "eta"}:
            assert metrics[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6), name
