"""Folders as quantisers write them: FP8 is read, the rest is told in one sentence, by whom and how."""

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
from megatron_troll.weights.quantised import refuse_for_servers, refuse_settings, without_settings
from megatron_troll.weights.scaled import open_folder
from megatron_troll.weights.source import RandomSource, check_folder, remarks_on
from tests.dist.tiny import MOE

LAYER = "model.layers.0."
LINEAR = LAYER + "mlp.experts.0.down_proj."
FP8, CODES = torch.float8_e4m3fn, torch.randint(0, 255, (48, 12))
MODELOPT = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quant_method": "modelopt"}
TENSOR = {"quant_method": "compressed-tensors", "version": "0.20.0"}
SCALE = torch.full((48, 1), 0.01)


def weights(**scheme: Any) -> dict[str, Any]:
    """One group of layers of compressed-tensors."""
    return {"group_0": {"weights": scheme, "targets": ["Linear"]}}


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
    "llm-compressor W4A16": (
        {**TENSOR, "format": "pack-quantized", "config_groups": weights(num_bits=4, type="int")},
        {
            LINEAR + "weight_packed": CODES.int(),
            LINEAR + "weight_scale": SCALE,
            LINEAR + "weight_shape": SCALE,
        },
        "quantised (llm-compressor, compressed-tensors 0.20.0, pack-quantized, 4-bit int weights; quant",
    ),
    "llm-compressor W8A8": (
        {**TENSOR, "format": "int-quantized", "config_groups": weights(num_bits=8, type="int")},
        {LINEAR + "weight": CODES.to(torch.int8), LINEAR + "weight_scale": SCALE},
        "quantised (llm-compressor, compressed-tensors 0.20.0, int-quantized, 8-bit int weights; quant",
    ),
    "ModelOpt NVFP4": (
        {**MODELOPT, "quant_algo": "NVFP4"},
        {
            LINEAR + "weight": CODES.to(torch.uint8),
            LINEAR + "weight_scale": SCALE.to(FP8),
            LINEAR + "weight_scale_2": torch.tensor(0.01),
        },
        "the weights are quantised (NVIDIA ModelOpt 0.47.0, NVFP4; quantization_config of config.json)",
    ),
    "ModelOpt FP8, saved again by transformers": (
        {**MODELOPT, "quant_algo": "FP8"},
        {LINEAR + "weight": CODES.bfloat16()},
        "(NVIDIA ModelOpt 0.47.0, FP8; quantization_config of config.json), and the weights are plain",
    ),
    "FP8 by blocks, scales lost": (
        {"quant_method": "fp8", "fmt": "e4m3"},
        {LINEAR + "weight": CODES.to(FP8)},
        "is F8_E4M3 (48, 12) and has no scale beside it",
    ),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        {LAYER + "mlp.experts.down_proj_blocks": CODES.to(torch.uint8), LAYER + "x_proj_scales": SCALE},
        "the weights are quantised (mxfp4; quantization_config of config.json)",
    ),
    "AWQ": (
        {"quant_method": "awq", "bits": 4},
        {LINEAR + "qweight": CODES.int(), LINEAR + "qzeros": CODES.int(), LINEAR + "scales": SCALE},
        "the weights are quantised (AWQ, 4 bits; quantization_config of config.json)",
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4},
        {LINEAR + "qweight": CODES.int(), LINEAR + "qzeros": CODES.int(), LINEAR + "scales": SCALE},
        "the weights are quantised (GPTQ, 4 bits; quantization_config of config.json)",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes"},
        {
            LINEAR + "weight": CODES.to(torch.uint8),
            LINEAR + "weight.absmax": SCALE,
            LINEAR + "weight.quant_state.bitsandbytes__nf4": CODES.to(torch.uint8),
        },
        "the weights are quantised (bitsandbytes; quantization_config of config.json)",
    ),
    "torchao": (
        {"quant_method": "torchao"},
        {LINEAR + "_weight_qdata": CODES.to(torch.int8), LINEAR + "_weight_scale": SCALE},
        "the weights are quantised (torchao; quantization_config of config.json)",
    ),
    "MLX": (
        {"group_size": 64, "bits": 4},
        {LINEAR + "weight": CODES.to(torch.uint32), LINEAR + "scales": SCALE, LINEAR + "biases": SCALE},
        "the weights are quantised (MLX, 4 bits; quantization_config of config.json)",
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
    if changed:
        del tensors[LINEAR + "weight"]
    write(tmp_path, tensors | changed, settings)
    with pytest.raises(ConfigError) as caught:
        check_folder(tmp_path, shape_of(MOE))
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert str(caught.value).count("use the folder of bf16 or fp32 weights that it was made from") == 1
    assert "\n" not in str(caught.value)


READ = {
    "llm-compressor FP8": (
        {**TENSOR, "config_groups": weights(num_bits=8, type="float", strategy="channel")},
        {LINEAR + "weight_scale": SCALE},
    ),
    "ModelOpt FP8 with a cache": (
        {**MODELOPT, "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {
            LINEAR + "weight_scale": torch.tensor(0.01),
            LINEAR + "input_scale": torch.tensor(0.01),
            LAYER + "self_attn.k_proj.k_scale": torch.tensor(1.0),
        },
    ),
    "DeepSeek's blocks": (
        {"quant_method": "fp8", "weight_block_size": [48, 24]},
        {LINEAR + "weight_scale_inv": SCALE[:1]},
    ),
}


@pytest.mark.parametrize("tool", READ)
@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_fp8_with_its_scales_is_a_model(tool: str, where: str, tmp_path: Path) -> None:
    settings, scales = READ[tool]
    tensors = plain() | scales | {LINEAR + "weight": plain()[LINEAR + "weight"].to(FP8)}
    write(tmp_path, tensors, settings if where == "config.json" else None)
    if where != "config.json":
        (tmp_path / where).write_text(json.dumps(settings))
    check_folder(tmp_path, shape_of(MOE))
    refuse_settings(tmp_path)
    (said,) = remarks_on(tmp_path)
    assert f"{where}): 1 FP8 weights are multiplied by their scales" in said
    with pytest.raises(ConfigError, match=r"^models\.policy\.path: .* is quantised .*convert hf2mcore"):
        refuse_for_servers(tmp_path, "models.policy.path")


def test_the_file_of_modelopt_is_enough(tmp_path: Path) -> None:
    write(tmp_path, plain(), None)
    content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    said = r"quantised \(NVIDIA ModelOpt 0\.47\.0, FP8; hf_quant_config\.json\)"
    for read in (FolderSource, open_folder):
        with pytest.raises(ConfigError, match=said):
            read(tmp_path)
    content["quantization"]["quant_algo"] = "NVFP4"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said.replace("FP8", "NVFP4")):
        refuse_settings(tmp_path)


def test_settings_of_the_text_model_count(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4}
    write(tmp_path, plain(), None, text_config={"quantization_config": settings})
    with pytest.raises(ConfigError, match=r"text_config\.quantization_config of config\.json"):
        open_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert without_settings(config) == {**MOE, "text_config": {}}


def test_plain_weights_are_taken(tmp_path: Path) -> None:
    check_folder(write(tmp_path, plain(), None), shape_of(MOE))


def test_what_the_files_say_reaches_the_terminal_without_escapes(tmp_path: Path) -> None:
    write(tmp_path, plain(), {"quant_method": "\x1b[31m" + "x" * 1000})
    with pytest.raises(ConfigError) as caught:
        FolderSource(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700
