"""A checkpoint that the project wrote on megatron-core 0.16.1 is continued, to every digit of its state.

recorded/megatron_core_0_16_1 has step 10 of a tiny Qwen3-MoE in fp32 on TP2 x EP2, with the distributed
optimizer, after two steps of training (checkpoint_run.py); after.json, what 0.16.1 gave for the two steps
that follow, as (loss, gradient norm).
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.weights.megatron_keys import Region
from megatron_troll.weights.torch_dist import SavedTensors
from tests.dist.checkpoint_run import STEPS, Run, Step, fill, train, training
from tests.dist.harness import RankPool
from tests.dist.tiny import MOE, reference

RECORDED = Path(__file__).parent / "recorded" / "megatron_core_0_16_1"
SMALL = MOE | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 8,
}


def continued(run: Run, resaved: str) -> tuple[dict[str, object], list[Step]]:
    """Load, save what was loaded under another number, and go on."""
    with training(run) as trained:
        fill(trained, 7.0)
        state = Checkpoints(RECORDED, {"policy": trained}).load(10)
        Checkpoints(resaved, {"policy": trained}).save(11, state)
        return state, train(trained, STEPS)


def test_a_checkpoint_of_0_16_1_continues(ranks2: RankPool, tmp_path: Path) -> None:
    run = Run(dict(reference(SMALL, seed=1).state_dict()), {"tp": 2, "ep": 2}, SMALL)
    after = json.loads((RECORDED / "after.json").read_text())
    for state, steps in ranks2.run(continued, run, str(tmp_path)):
        assert state == {"position": 3}
        assert steps == [pytest.approx(step, rel=1e-6) for step in after]
    there, here = tensors_of(RECORDED / "step_000010"), tensors_of(tmp_path / "step_000011")
    assert there.keys() == here.keys()
    assert len([name for name in there if "exp_avg" in name]) == 2 * len([n for n in there if ".param." in n])
    unequal = [name for name, tensor in there.items() if not torch.equal(tensor, here[name])]
    assert unequal == []


def tensors_of(step: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, fp32 copies and moments."""
    saved = SavedTensors(step / "tensors")
    return {name: saved.read(whole(name, tensor.shape)) for name, tensor in saved.tensors.items()}


def whole(key: str, shape: tuple[int, ...]) -> Region:
    return Region(key, shape, (0,) * len(shape), shape)
