"""Folders as quantisers write them: told in one sentence, by whom and how they were quantised."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.mcore.shape import shape_of
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.quantised import refuse_settings
from megatron_troll.weights.source import RandomSource, check_folder
from tests.dist.tiny import MOE

LAYER = "model.layers.0."
LINEAR = LAYER + "mlp.experts.0.down_proj."
FP8, CODES = torch.float8_e4m3fn, torch.randint(0, 255, (48, 12))
MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quant_method": "modelopt"}
TENSOR = {"quant_method": "compressed-tensors", "version": "0.20.0"}
SCALE = torch.full((48, 1), 0.01)


def plain(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    source = RandomSource(shape_of(MOE), seed=0)
    return {name: source.read(name).to(dtype) for name in source.shapes}


def write(folder: Path, tensors: dict[str, Tensor], settings: Any, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MOE, "quantization_config": settings, **more}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


# As the tools name and shape them: settings, tensors in place of one linear layer's, and what is told.
TOOLS = {
    "llm-compressor FP8": (
        {**TENSOR, "format": "float-quantized"},
        {LINEAR + "weight": CODES.to(FP8), LINEAR + "weight_scale": SCALE},
        "the weights are quantised (llm-compressor, compressed-tensors 0.20.0, float-quantized)",
    ),
    "llm-compressor W4A16": (
        {**TENSOR, "format": "pack-quantized"},
        {
            LINEAR + "weight_packed": CODES.int(),
            LINEAR + "weight_scale": SCALE,
            LINEAR + "weight_shape": SCALE,
        },
        "the weights are quantised (llm-compressor, compressed-tensors 0.20.0, pack-quantized)",
    ),
    "llm-compressor KV cache": (
        {**TENSOR, "format": "dense"},
        {LAYER + "self_attn.k_scale": torch.ones(1), LAYER + "self_attn.v_scale": torch.ones(2, 1, 1)},
        "scales of a quantised KV cache are beside the weights (llm-compressor",
    ),
    "ModelOpt FP8": (
        {**MODELOPT, "quant_algo": "FP8"},
        {
            LINEAR + "weight": CODES.to(FP8),
            LINEAR + "weight_scale": torch.tensor(0.01),
            LINEAR + "input_scale": torch.tensor(0.01),
            LAYER + "self_attn.k_proj.k_scale": torch.tensor(1.0),
        },
        "the weights are quantised (NVIDIA ModelOpt 0.47.0, FP8)",
    ),
    "ModelOpt NVFP4": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        {
            LINEAR + "weight": CODES.to(torch.uint8),
            LINEAR + "weight_scale": SCALE.to(FP8),
            LINEAR + "weight_scale_2": torch.tensor(0.01),
        },
        "the weights are quantised (NVIDIA ModelOpt 0.47.0, NVFP4)",
    ),
    "ModelOpt KV cache, without scales": (
        {**MODELOPT, "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {},
        "its files say that the model is quantised (NVIDIA ModelOpt 0.47.0, KV cache FP8)",
    ),
    "FP8 by blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]},
        {LINEAR + "weight": CODES.to(FP8), LINEAR + "weight_scale_inv": SCALE},
        "or dequantise it: mtroll convert hf2mcore",
    ),
    "FP8 by blocks, scales lost": (
        {"quant_method": "fp8", "fmt": "e4m3"},
        {LINEAR + "weight": CODES.to(FP8)},
        "the weights are quantised (FP8 with a scale a block, e4m3)",
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {LINEAR + "qweight": CODES.int(), LINEAR + "qzeros": CODES.int(), LINEAR + "scales": SCALE},
        "the weights are quantised (GPTQ, 4 bits)",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes"},
        {
            LINEAR + "weight": CODES.to(torch.uint8),
            LINEAR + "weight.absmax": SCALE,
            LINEAR + "weight.quant_state.bitsandbytes__nf4": CODES.to(torch.uint8),
        },
        "the weights are quantised (bitsandbytes)",
    ),
    "torchao": (
        {"quant_method": "torchao"},
        {LINEAR + "_weight_qdata": CODES.to(torch.int8), LINEAR + "_weight_scale": SCALE},
        "the weights are quantised (torchao)",
    ),
    "MLX": (
        {"group_size": 64, "bits": 4},
        {LINEAR + "weight": CODES.to(torch.uint32), LINEAR + "scales": SCALE, LINEAR + "biases": SCALE},
        "the weights are quantised (MLX, 4 bits)",
    ),
    "nobody": (
        None,
        {LINEAR + "weight": CODES.to(torch.int8)},
        "the weights are quantised (by an unknown tool)",
    ),
    "left behind": (
        {"quant_method": "fp8", "fmt": "e4m3"},
        {},
        "the weights are plain numbers, which may be codes whose scales are lost",
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_quantiser_wrote_is_told_in_one_sentence(tool: str, tmp_path: Path) -> None:
    settings, changed, sentence = TOOLS[tool]
    tensors = plain()
    if changed and not any("self_attn.k_scale" in name for name in changed):
        del tensors[LINEAR + "weight"]
    write(tmp_path, tensors | changed, settings)
    with pytest.raises(ConfigError) as caught:
        check_folder(tmp_path, shape_of(MOE))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_the_file_of_modelopt_is_enough(tmp_path: Path) -> None:
    write(tmp_path, plain(), None)
    content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"quantised \(NVIDIA ModelOpt 0\.47\.0, FP8\)"):
        FolderSource(tmp_path)
    with pytest.raises(ConfigError, match=r"quantised \(NVIDIA ModelOpt 0\.47\.0, FP8\)"):
        refuse_settings(tmp_path)


def test_plain_weights_are_taken(tmp_path: Path) -> None:
    check_folder(write(tmp_path, plain(), None), shape_of(MOE))


def test_what_the_files_say_reaches_the_terminal_without_escapes(tmp_path: Path) -> None:
    write(tmp_path, plain(), {"quant_method": "\x1b[31m" + "x" * 1000})
    with pytest.raises(ConfigError) as caught:
        FolderSource(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700
