"""Recognise folders with quantised weights: their numbers are codes, which mean nothing without scales.

Quantisers name their scales differently, and leave their settings in config.json or hf_quant_config.json. One
sentence tells all commands what is there.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_troll.config import ConfigError
from megatron_troll.weights.tensor_file import NAMES, Stored

CONFIG, MODELOPT_CONFIG = "config.json", "hf_quant_config.json"
# Keys of config.json that describe quantised weights: transformers' own, its older name, and MLX's.
SETTINGS = ("quantization_config", "compression_config", "quantization")
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CACHE_SCALE = re.compile(r"(^|\.)([qkv]|kv|kv_cache)_(scale|zero_point)$")
SCALE = re.compile(
    r"[._](scales?|scale_inv|scale_2|global_scale|zero_points?|packed|weight_shape|qdata|qweight|qzeros|g_idx"
    r"|blocks|biases|absmax|quant_map|quant_state\..*|SCB|weight_format)$"
)
WEIGHT = re.compile(r"(weight|_proj)$")
TOOLS = {
    "compressed-tensors": "llm-compressor, compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "fp8": "FP8 with a scale a block",
    "fbgemm_fp8": "FBGEMM",
    "awq": "AWQ",
    "gptq": "GPTQ",
}


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of quantisation in a folder's files; {} if there are none."""
    config = _json(folder / CONFIG)
    found = next((config[key] for key in SETTINGS if isinstance(config.get(key), dict)), {})
    return found or _json(folder / MODELOPT_CONFIG)


def refuse_quantised(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ConfigError, in one sentence, if a folder with these tensors holds quantised weights, scales of a
    quantised KV cache, or plain weights that its files call quantised. Reads no weights."""
    refuse_codes(folder, tensors)
    if settings := settings_of(folder):
        raise ConfigError(
            f"{folder}: its files say that the model is quantised ({described(settings)}), and the weights "
            "are plain numbers, which may be codes whose scales are lost: use the folder that they were made "
            f"from; if they are known to be weights, delete {SETTINGS[0]} from {CONFIG}, and "
            f"{MODELOPT_CONFIG} if there is one"
        )


def refuse_codes(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ConfigError, in one sentence, if some of these tensors of a folder are codes or scales."""
    cache = [name for name in tensors if CACHE_SCALE.search(name)]
    codes = [name for name, stored in tensors.items() if WEIGHT.search(name) and stored.dtype not in PLAIN]
    scales = [name for name in tensors if SCALE.search(name) and name not in cache]
    if not codes and not scales and not cache:
        return
    settings = settings_of(folder)
    what = "scales of a quantised KV cache are beside the weights"
    if codes or scales:
        what = "the weights are quantised"
    shown = (codes or scales or cache)[0]
    stored = tensors[shown]
    by = described(settings) if settings else "by an unknown tool"
    advice = "use the folder of bf16 or fp32 weights that it was made from"
    if settings.get("quant_method") == "fp8" and any(name.endswith("_scale_inv") for name in scales):
        advice += f", or dequantise it: mtroll convert hf2mcore {folder} TARGET"
    raise ConfigError(
        f"{folder}: {what} ({by}), e.g. {shown!a} {NAMES[stored.dtype]} {stored.shape}: {advice}"
    )


def refuse_settings(folder: Path) -> None:
    """Raise ConfigError if the files beside the weights of a folder say that they are quantised."""
    if settings := settings_of(folder):
        raise ConfigError(
            f"{folder}: its files say that the model is quantised ({described(settings)}): use the folder of "
            "bf16 or fp32 weights that it was made from"
        )


def described(settings: Mapping[str, Any]) -> str:
    """Name the tool and the format, e.g. "NVIDIA ModelOpt 0.47.0, NVFP4"."""
    producer = settings.get("producer")
    producer = producer if isinstance(producer, dict) else {}
    method = str(settings.get("quant_method", producer.get("name", "")))
    inner = settings.get("quantization")
    inner = {**settings, **(inner if isinstance(inner, dict) else {})}
    version = producer.get("version") or (settings.get("version") if method == "compressed-tensors" else None)
    formats = [inner[key] for key in ("quant_algo", "format", "fmt", "quant_type") if inner.get(key)]
    if not formats and (bits := inner.get("bits")):
        formats = [f"{bits} bits"]
    if not formats and inner.get("kv_cache_quant_algo"):
        formats = [f"KV cache {inner['kv_cache_quant_algo']}"]
    if not method and "group_size" in settings:
        method = "MLX"
    tool = TOOLS.get(method, method or "an unknown tool")
    parts = (f"{tool} {version}" if version else tool, *formats)
    return ascii(", ".join(str(part) for part in parts))[1:-1][:120]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
