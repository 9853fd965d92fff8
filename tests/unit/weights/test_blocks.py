"""Block-scaled FP8 becomes the weights that its publishers' formula gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megatron_troll.config import ConfigError
from megatron_troll.weights.blocks import BlockScaled

FP8 = torch.float8_e4m3fn
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
NAME, STACK = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"


def codes(*shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 100).clamp(-448, 448).to(FP8)


def scales(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 1e-3


def write(folder: Path, tensors: dict[str, Tensor], settings: Any = SETTINGS) -> Path:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_weights_are_those_that_hugging_face_dequantises(tmp_path: Path) -> None:
    tensors = {
        NAME: codes(64, 96),
        NAME + "_scale_inv": scales(4, 3),
        STACK: codes(3, 32, 64),
        STACK + "_scale_inv": scales(3, 2, 2),
        "model.norm.weight": torch.ones(5),
    }
    source = BlockScaled(write(tmp_path, tensors))
    reference: Any = Fp8Dequantize(None)
    assert source.shapes == {NAME: (64, 96), STACK: (3, 32, 64), "model.norm.weight": (5,)}
    for name in (NAME, STACK):
        expected = reference._dequantize_one(tensors[name], tensors[name + "_scale_inv"], torch.bfloat16)
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), expected)
        assert torch.equal(source.read(name, 1), expected[1])
    assert source.dtype("model.norm.weight") == torch.float32
    assert str(source) == "dequantised 2 tensors of block-scaled FP8 to bfloat16"


def test_blocks_at_the_edges_may_be_smaller(tmp_path: Path) -> None:
    whole, scale = codes(40, 48), scales(3, 2)
    source = BlockScaled(write(tmp_path, {NAME: whole, NAME + "_scale_inv": scale}))
    expected = torch.empty(40, 48)
    for i in range(40):
        for j in range(48):
            expected[i, j] = whole[i, j].float() * scale[i // 16, j // 32]
    assert torch.equal(source.read(NAME), expected.bfloat16())


def test_scales_that_are_powers_of_two_are_read(tmp_path: Path) -> None:
    whole, scale = codes(16, 64), torch.tensor([[0.25, 2.0]])
    tensors = {NAME: whole, NAME + "_scale_inv": scale.to(torch.float8_e8m0fnu)}
    expected = whole.float() * scale.repeat_interleave(32, 1)
    assert torch.equal(BlockScaled(write(tmp_path, tensors)).read(NAME), expected.bfloat16())


@pytest.mark.parametrize(
    ("tensors", "settings", "what"),
    [
        ({NAME + "_scale_inv": scales(4, 2)}, SETTINGS, r"_scale_inv has shape \(4, 2\).*needs \(4, 3\)"),
        ({NAME + "_scale_inv": scales(4, 3).half()}, SETTINGS, "_scale_inv has shape"),
        ({}, SETTINGS, "the weights are quantised"),
        ({NAME + "_scale_inv": scales(4, 3)}, {"quant_method": "fp8"}, "the weights are quantised"),
        (
            {NAME + "_scale_inv": scales(4, 3), "y.weight": codes(16, 16)},
            SETTINGS,
            r"the weights are quantised .* e\.g\. 'y\.weight'",
        ),
        (
            {NAME + "_scale_inv": scales(4, 3), "y.input_scale": torch.ones(1)},
            SETTINGS,
            r"the weights are quantised .* e\.g\. 'y\.input_scale'",
        ),
    ],
    ids=["grid", "dtype", "no scales", "no block size", "other codes", "static inputs"],
)
def test_anything_else_is_refused(
    tensors: dict[str, Tensor], settings: dict[str, Any], what: str, tmp_path: Path
) -> None:
    write(tmp_path, {NAME: codes(64, 96), **tensors}, settings)
    with pytest.raises(ConfigError, match=what):
        BlockScaled(tmp_path)


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bad = scales(4, 3)
    bad[1, 1] = float("nan")
    source = BlockScaled(write(tmp_path, {NAME: codes(64, 96), NAME + "_scale_inv": bad}))
    with pytest.raises(ConfigError, match=f"1 of the 12 values of {NAME}_scale_inv are not finite"):
        source.read(NAME)
