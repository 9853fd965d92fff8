"""FP8 weights with scales beside them become the weights that their publishers' formula gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megatron_troll.config import ConfigError
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.scaled import Scaled, open_folder

FP8 = torch.float8_e4m3fn
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
FBGEMM = {"quant_method": "fbgemm_fp8"}
MODELOPT = {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.47.0"}}
NAME, STACK = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"


def compressed(**weights: Any) -> dict[str, Any]:
    """The settings of llm-compressor for one group of layers."""
    group = {"weights": {"num_bits": 8, "type": "float", **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
    }


def codes(*shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 100).clamp(-448, 448).to(FP8)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 1e-3


def write(folder: Path, tensors: dict[str, Tensor], settings: Any = DEEPSEEK) -> Path:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def opened(folder: Path, dtype: torch.dtype | None = None) -> Scaled:
    source = open_folder(folder, dtype)
    assert isinstance(source, Scaled)
    return source


def test_blocks_are_as_hugging_face_dequantises_them(tmp_path: Path) -> None:
    tensors = {
        NAME: codes(64, 96),
        NAME + "_scale_inv": scales(4, 3),
        STACK: codes(3, 32, 64),
        STACK + "_scale_inv": scales(3, 2, 2),
        "model.norm.weight": torch.ones(5),
    }
    source = opened(write(tmp_path, tensors))
    reference: Any = Fp8Dequantize(None)
    assert source.shapes == {NAME: (64, 96), STACK: (3, 32, 64), "model.norm.weight": (5,)}
    for name in (NAME, STACK):
        expected = reference._dequantize_one(tensors[name], tensors[name + "_scale_inv"], torch.bfloat16)
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(source.read(name), expected)
        assert torch.equal(source.read(name, 1), expected[1])
    assert source.dtype("model.norm.weight") == torch.float32
    assert source.remarks == [
        f"{tmp_path} (FP8, e4m3, blocks [16, 32]; quantization_config of config.json): 2 FP8 weights are "
        "multiplied by their scales; exports are plain weights"
    ]


def by_number(whole: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Every code times the scale of its block, number by number."""
    rows = [
        [float(whole[i, j]) * float(scale[i // block[0], j // block[1]]) for j in range(whole.shape[1])]
        for i in range(whole.shape[0])
    ]
    return torch.tensor(rows)


# Settings, shape of the codes, name and shape of the scale, and the block that each scale is for.
FORMS = {
    "edges": (DEEPSEEK, (40, 48), "_scale_inv", (3, 2), (16, 32)),
    "static FP8 of vLLM": ({"quant_method": "fp8"}, (6, 10), "_scale", (1,), (6, 10)),
    "llm-compressor, a tensor": (compressed(strategy="tensor"), (6, 10), "_scale", (1,), (6, 10)),
    "llm-compressor, a row": (compressed(strategy="channel"), (6, 10), "_scale", (6, 1), (1, 10)),
    "llm-compressor, a block": (compressed(block_structure=[4, 8]), (6, 10), "_scale", (2, 2), (4, 8)),
    "older: 4x8": (compressed(block_structure="4x8"), (6, 10), "_scale", (2, 2), (4, 8)),
    "llm-compressor, a group": (
        compressed(strategy="group", group_size=5),
        (6, 10),
        "_scale",
        (6, 2),
        (1, 5),
    ),
    "FBGEMM": (FBGEMM, (6, 10), "_scale", (6, 1), (1, 10)),
    "ModelOpt FP8": (MODELOPT | {"quant_algo": "FP8"}, (6, 10), "_scale", (), (6, 10)),
    "ModelOpt, a row": (
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        (6, 10),
        "_scale",
        (6,),
        (1, 10),
    ),
    "ModelOpt, blocks": (
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
        (130, 256),
        "_scale",
        (2, 1, 2, 1),
        (128, 128),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_is_for_a_tensor_a_row_or_a_block(form: str, tmp_path: Path) -> None:
    settings, shape, end, there, block = FORMS[form]
    whole, scale = codes(*shape), scales(*there)
    write(tmp_path, {NAME: whole, NAME + end: scale}, settings)
    rows, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    expected = by_number(whole, scale.reshape(rows, columns), block)
    assert torch.equal(opened(tmp_path, torch.float32).read(NAME), expected)
    rounded = opened(tmp_path)
    assert torch.equal(rounded.read(NAME), expected.bfloat16())
    assert torch.equal(rounded.read(NAME, 3), expected[3].bfloat16())


@pytest.mark.parametrize("there", [(), (1,), (3,), (3, 1, 1), (3, 4), (3, 4, 1)], ids=str)
def test_a_stack_of_experts_may_have_a_scale_for_each(there: tuple[int, ...], tmp_path: Path) -> None:
    whole, scale = codes(3, 4, 8), scales(*there)
    write(tmp_path, {STACK: whole, STACK + "_scale": scale}, compressed(strategy="tensor"))
    of_expert = scale.reshape(3, -1) if scale.numel() > 1 else scale.reshape(1, 1).expand(3, 1)
    expected = whole.float() * of_expert[:, :, None]
    source = opened(tmp_path, torch.float32)
    assert torch.equal(source.read(STACK), expected)
    assert torch.equal(source.read(STACK, 2), expected[2])


def test_scales_that_are_powers_of_two_are_read(tmp_path: Path) -> None:
    whole, scale = codes(16, 64), torch.tensor([[0.25, 2.0]])
    tensors = {NAME: whole, NAME + "_scale_inv": scale.to(torch.float8_e8m0fnu)}
    expected = whole.float() * scale.repeat_interleave(32, 1)
    assert torch.equal(opened(write(tmp_path, tensors)).read(NAME), expected.bfloat16())


def test_scales_in_bf16_are_widened_before_the_product(tmp_path: Path) -> None:
    """3.5 x 1.0078125 = 3.52734375, which bf16 would round to 3.53125."""
    tensors = {NAME: torch.full((2, 2), 3.5).to(FP8), NAME + "_scale": torch.tensor(1.0078125).bfloat16()}
    source = opened(write(tmp_path, tensors, compressed(strategy="tensor")), torch.float32)
    assert source.read(NAME).unique().tolist() == [3.52734375]


def test_scales_of_activations_and_cache_are_left_out_and_said(tmp_path: Path) -> None:
    tensors = {
        NAME: codes(4, 4),
        NAME + "_scale": torch.tensor(0.5),
        "model.layers.0.self_attn.q_proj.input_scale": torch.tensor(0.1),
        STACK: torch.ones(2, 4, 4),
        STACK + "_activation_scale": torch.ones(1),
        "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1),
        "model.layers.0.self_attn.v_proj.output_scale": torch.ones(1),
    }
    source = opened(write(tmp_path, tensors, MODELOPT | {"quant_algo": "FP8"}))
    assert set(source.shapes) == {NAME, STACK}
    (said,) = source.remarks
    assert "1 FP8 weights are multiplied by their scales, 2 scales of activations (such as model." in said
    assert (
        "2 scales of an FP8 KV cache (such as model.layers.0.self_attn.k_proj.k_scale) are left out" in said
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
        MODELOPT | {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        None,
    ],
    ids=["llm-compressor", "ModelOpt", "settings deleted"],
)
def test_plain_weights_beside_scales_of_a_cache_are_read(settings: Any, tmp_path: Path) -> None:
    tensors = {NAME: torch.randn(4, 4), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    source = opened(write(tmp_path, tensors, settings))
    assert set(source.shapes) == {NAME}
    assert torch.equal(source.read(NAME), tensors[NAME])
    assert "1 scales of an FP8 KV cache" in source.remarks[0]


def test_settings_of_a_cache_alone_leave_a_folder_plain(tmp_path: Path) -> None:
    settings = MODELOPT | {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    assert isinstance(open_folder(write(tmp_path, {NAME: torch.ones(2, 2)}, settings)), FolderSource)


BLOCKS = {NAME + "_scale_inv": scales(4, 3)}


@pytest.mark.parametrize(
    ("tensors", "settings", "what"),
    [
        ({NAME + "_scale_inv": scales(4, 2)}, DEEPSEEK, r"_scale_inv has shape \(4, 2\).*\(\(16, 32\)\)"),
        (
            {NAME + "_scale_inv": scales(4, 3).double()},
            DEEPSEEK,
            "shape .* and dtype F64, which are no scales",
        ),
        (BLOCKS, {"quant_method": "fp8"}, "names no size of blocks"),
        ({}, DEEPSEEK, f"'{NAME}' is F8_E4M3 .* has no scale beside it"),
        (BLOCKS | {"y.weight": codes(16, 16)}, DEEPSEEK, r"'y\.weight' is F8_E4M3 .* no scale beside it"),
        (
            BLOCKS | {"y.weight": torch.ones(2, 2), "y.weight_scale": torch.ones(2, 1)},
            DEEPSEEK,
            r"'y\.weight_scale' is a scale of 'y\.weight', which is F32 instead of FP8",
        ),
        (BLOCKS | {"y.weight_scale_inv": torch.ones(2, 1)}, DEEPSEEK, "'y.weight', which is missing"),
        (BLOCKS | {"y.weight": torch.ones(2, 2).to(torch.int8)}, DEEPSEEK, r"quantised .* 'y\.weight' I8"),
        (BLOCKS | {"y.pre_quant_scale": torch.ones(2)}, DEEPSEEK, r"quantised .* 'y\.pre_quant_scale' F32"),
        (BLOCKS, None, "quantised .by an unknown tool., e.g."),
        (BLOCKS, compressed() | {"transform_config": {"config_groups": {"u": {}}}}, "quantised .llm-compr"),
        (BLOCKS, compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "quantised .llm-compr"),
        (BLOCKS, MODELOPT | {"quant_algo": "MXFP8"}, "quantised .NVIDIA ModelOpt 0.47.0, MXFP8"),
    ],
    ids=[
        "grid",
        "dtype",
        "no block size",
        "no scale",
        "one without scale",
        "scale of a plain weight",
        "scale of nothing",
        "integers too",
        "scaled inputs",
        "unknown tool",
        "rotated",
        "sparse",
        "other formula",
    ],
)
def test_anything_else_is_refused_in_one_line(
    tensors: dict[str, Tensor], settings: dict[str, Any], what: str, tmp_path: Path
) -> None:
    write(tmp_path, {NAME: codes(64, 96), **tensors}, settings)
    with pytest.raises(ConfigError, match=what) as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_mixed_precision_is_told_tensor_by_tensor(tmp_path: Path) -> None:
    """ModelOpt names an algorithm a layer; all of them must be FP8."""
    tensors = {NAME: codes(2, 2), NAME + "_scale": torch.tensor(0.5), "lm_head.weight": torch.ones(2, 2)}
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "FP8_PB_WO"}}
    settings = MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert opened(write(tmp_path, tensors, settings)).dtype("lm_head.weight") == torch.float32
    layers["b"] = {"quant_algo": "NVFP4"}
    write(tmp_path, tensors | {"b.weight": torch.ones(2, 1).to(torch.uint8)}, settings)
    with pytest.raises(ConfigError, match=r"'b\.weight' U8"):
        open_folder(tmp_path)


@pytest.mark.parametrize("bad", ["scale", "code"])
def test_a_value_that_is_not_finite_is_named(bad: str, tmp_path: Path) -> None:
    whole, scale = codes(64, 96), scales(4, 3)
    (scale if bad == "scale" else whole.view(torch.uint8))[1, 1] = float("nan") if bad == "scale" else 0x7F
    source = opened(write(tmp_path, {NAME: whole, NAME + "_scale_inv": scale}))
    what = f"12 values of {NAME}_scale_inv" if bad == "scale" else f"6144 values of {NAME}"
    with pytest.raises(ConfigError, match=f"1 of the {what} are not finite"):
        source.read(NAME)
