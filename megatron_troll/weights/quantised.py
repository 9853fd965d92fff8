"""Recognise folders with quantised weights: their numbers are codes, which mean nothing without scales.

Quantisers name their scales differently, and leave their settings in config.json or hf_quant_config.json. FP8
codes with scales can be read (weights/scaled.py); one sentence tells all commands what else is there.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_troll.config import ConfigError
from megatron_troll.weights.tensor_file import NAMES, Stored

CONFIG, MODELOPT_CONFIG = "config.json", "hf_quant_config.json"
# Keys of config.json that describe quantised weights: transformers' own, its older name, and MLX's.
SETTINGS = ("quantization_config", "compression_config", "quantization")
TEXT = "text_config"
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHE_SCALE = re.compile(r"(^|\.)(([qkv]|kv|kv_cache|prob)_(scale|zero_point)|[kv]_proj\.output_scale)$")
INPUT_SCALE = re.compile(r"[._](input|activation|output)_(scale(_ub|_inv)?|zero_point)$")
SCALE = re.compile(
    r"[._](scales?|scale_inv|scale_2|global_scale|zero_points?|packed|weight_shape|qdata|qweight|qzeros|g_idx"
    r"|blocks|biases|absmax|quant_map|quant_state\..*|SCB|weight_format|bitmask|compressed)$"
)
WEIGHT_SCALE = re.compile(r"(?:(?<=weight)|(?<=_proj))_scale(_inv)?$")
WEIGHT = re.compile(r"(weight|_proj)$")
TOOLS = {
    "compressed-tensors": "llm-compressor, compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "awq": "AWQ",
    "gptq": "GPTQ",
}
MODELOPT_BLOCK = 128
PLAIN_FOLDER = "use the folder of bf16 or fp32 weights that it was made from"


@dataclass(frozen=True)
class Quantisation:
    """The words of a folder's files on its quantisation: the settings ({} if there are none), and where they
    stand."""

    settings: Mapping[str, Any]
    where: str = ""

    def __bool__(self) -> bool:
        return bool(self.settings)

    def __str__(self) -> str:
        """The tool, the format and the place, e.g. "NVIDIA ModelOpt 0.47.0, NVFP4; hf_quant_config.json"."""
        return f"{described(self.settings)}; {self.where}" if self else "by an unknown tool"

    @cached_property
    def method(self) -> str:
        producer = self.settings.get("producer")
        name = producer.get("name", "") if isinstance(producer, dict) else ""
        return str(self.settings.get("quant_method", name))

    @property
    def algorithms(self) -> set[str]:
        """The algorithms that ModelOpt names; in a folder of mixed precision, those of its layers."""
        inner = _inner(self.settings)
        layers = inner.get("quantized_layers")
        if isinstance(layers, dict):
            return {str(layer.get("quant_algo")) for layer in layers.values() if isinstance(layer, dict)}
        return {str(inner["quant_algo"])} if inner.get("quant_algo") else set()

    @property
    def only_cache(self) -> bool:
        """Whether weights are plain by these settings, and only a KV cache is quantised."""
        match self.method:
            case "compressed-tensors":
                weights = bool(_weights_of(self.settings))
            case "modelopt":
                weights = bool(self.algorithms or _weights_of(self.settings))
            case _:
                return False
        inner = _inner(self.settings)
        return not weights and bool(inner.get("kv_cache_scheme") or inner.get("kv_cache_quant_algo"))

    @property
    def readable(self) -> bool:
        """Whether every quantised weight is FP8 times a scale by these settings."""
        match self.method:
            case "fp8" | "fbgemm_fp8":
                return True
            case "compressed-tensors":
                weights = _weights_of(self.settings)
                eights = all(one.get("num_bits") == 8 and one.get("type") == "float" for one in weights)
                return eights and not _altered(self.settings)
            case "modelopt":
                named = self.algorithms
                return self.only_cache or (bool(named) and all(one.startswith("FP8") for one in named))
        return False

    @property
    def blocks(self) -> set[tuple[int, int]]:
        """The sizes (rows, columns) of blocks that have a scale each."""
        match self.method:
            case "fp8":
                found = [self.settings.get("weight_block_size")]
            case "compressed-tensors":
                weights = _weights_of(self.settings)
                found = [one.get("block_structure") or [1, one.get("group_size")] for one in weights]
            case "modelopt":
                size = _inner(self.settings).get("group_size") or MODELOPT_BLOCK
                found = [[size, size]]
            case _:
                found = []
        return set(filter(None, map(_block, found)))


@dataclass(frozen=True)
class Found:
    """The tensors of a folder that are no plain weights. scaled: the scale of each FP8 weight; inputs, cache:
    scales of activations and of a KV cache, which no weight needs."""

    scaled: Mapping[str, str]
    inputs: Sequence[str]
    cache: Sequence[str]

    @property
    def beside(self) -> set[str]:
        """Everything that is no weight."""
        return {*self.scaled.values(), *self.inputs, *self.cache}


def quantisation_of(folder: Path) -> Quantisation:
    """The words of a folder's files on its quantisation."""
    config = _json(folder / CONFIG)
    for prefix, content in (("", config), (f"{TEXT}.", config.get(TEXT))):
        for key in SETTINGS:
            if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]:
                return Quantisation(content[key], f"{prefix}{key} of {CONFIG}")
    modelopt = _json(folder / MODELOPT_CONFIG)
    return Quantisation(modelopt, MODELOPT_CONFIG) if modelopt else Quantisation({})


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json without what it says of quantisation."""
    kept = {key: value for key, value in config.items() if key not in SETTINGS}
    if isinstance(kept.get(TEXT), dict):
        kept[TEXT] = {key: value for key, value in kept[TEXT].items() if key not in SETTINGS}
    return kept


def find(folder: Path, tensors: Mapping[str, Stored]) -> Found:
    """Find what a folder with these tensors holds besides plain weights. Reads no weights.

    Raises ConfigError, in one sentence, if it is quantised otherwise than by FP8 codes times scales, has such
    codes without scales or scales without codes, or calls plain weights quantised.
    """
    said = quantisation_of(folder)
    cache = [name for name in tensors if CACHE_SCALE.search(name)]
    inputs = [name for name in tensors if INPUT_SCALE.search(name) and name not in cache]
    scaled = dict(_pairs(tensors)) if said and said.readable else {}
    found = Found(scaled, inputs if scaled else (), cache)
    rest = {name: tensors[name] for name in tensors.keys() - found.scaled.keys() - found.beside}
    if said and said.readable:
        _refuse_unpaired(folder, rest)
    _refuse_codes(folder, rest, said)
    if said and not scaled and not said.only_cache:
        raise ConfigError(
            f"{folder}: its files say that the model is quantised ({said}), and the weights are plain "
            f"numbers, which may be codes whose scales are lost: {PLAIN_FOLDER}; if they are known to be "
            f"weights, delete {SETTINGS[0]} from {CONFIG}, and {MODELOPT_CONFIG} if there is one"
        )
    return found


def refuse_quantised(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raise ConfigError, in one sentence, unless a folder with these tensors holds plain weights alone."""
    found = find(folder, tensors)
    if found.beside:
        raise ConfigError(
            f"{folder}: the weights are quantised ({quantisation_of(folder)}), e.g. {min(found.beside)!a}: "
            f"{PLAIN_FOLDER}"
        )


def refuse_settings(folder: Path) -> None:
    """Raise ConfigError if the files beside the weights of a folder say that these cannot be read."""
    said = quantisation_of(folder)
    if said and not said.readable:
        raise ConfigError(f"{folder}: its files say that the model is quantised ({said}): {PLAIN_FOLDER}")


def refuse_for_servers(folder: Path, key: str) -> None:
    """Raise ConfigError naming `key` if SGLang, started from this folder, would quantise its weights: the
    trainer's are plain."""
    said = quantisation_of(folder)
    if said:
        raise ConfigError(
            f"{key}: {folder} is quantised ({said}): SGLang, started from it, would generate with "
            "quantised weights, the trainer's are plain: make a plain folder (mtroll convert hf2mcore FOLDER "
            "MCORE, then mtroll convert mcore2hf MCORE PLAIN) and name that, or set rollout.engine=inprocess"
        )


def described(settings: Mapping[str, Any]) -> str:
    """Name the tool and the format, e.g. "NVIDIA ModelOpt 0.47.0, NVFP4"."""
    said, inner = Quantisation(settings), _inner(settings)
    producer = settings.get("producer")
    version = producer.get("version") if isinstance(producer, dict) else None
    if said.method == "compressed-tensors":
        version = version or settings.get("version")
    formats = [inner[key] for key in ("quant_algo", "format", "fmt", "quant_type") if inner.get(key)]
    formats += sorted({_bits(one) for one in _weights_of(settings)})
    if block := inner.get("weight_block_size"):
        formats.append(f"blocks {block}")
    if not formats and (bits := inner.get("bits")):
        formats = [f"{bits} bits"]
    if not formats and inner.get("kv_cache_quant_algo"):
        formats = [f"KV cache {inner['kv_cache_quant_algo']}"]
    method = said.method or ("MLX" if "group_size" in settings else "an unknown tool")
    tool = TOOLS.get(method, method)
    parts = (f"{tool} {version}" if version else tool, *formats)
    return ascii(", ".join(str(part) for part in parts))[1:-1][:120]


def _pairs(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """(FP8 weight, its scale), for all weights that have one."""
    for name, stored in tensors.items():
        if stored.dtype in FP8 and len(stored.shape) in (2, 3):
            scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in tensors), None)
            if scale is not None:
                yield name, scale


def _refuse_unpaired(folder: Path, rest: Mapping[str, Stored]) -> None:
    """Raise ConfigError for an FP8 weight or a scale that has no counterpart."""
    for name, stored in sorted(rest.items()):
        if stored.dtype in FP8 and not SCALE.search(name):
            raise ConfigError(
                f"{folder}: {name!a} is {NAMES[stored.dtype]} {stored.shape} and has no scale beside it: "
                f"download the folder again, or {PLAIN_FOLDER}"
            )
        weight = WEIGHT_SCALE.sub("", name)
        if weight != name and rest.get(weight, stored).dtype in PLAIN:
            there = f"is {NAMES[rest[weight].dtype]}" if weight in rest else "is missing"
            raise ConfigError(
                f"{folder}: {name!a} is a scale of {weight!a}, which {there} instead of FP8: download the "
                f"folder again, or {PLAIN_FOLDER}"
            )


def _refuse_codes(folder: Path, tensors: Mapping[str, Stored], said: Quantisation) -> None:
    """Raise ConfigError if some of these tensors of a folder are codes or scales."""
    codes = [name for name, stored in tensors.items() if WEIGHT.search(name) and stored.dtype not in PLAIN]
    scales = [name for name in tensors if SCALE.search(name)]
    if codes or scales:
        shown = min(codes or scales)
        stored = tensors[shown]
        why = "" if stored.dtype in FP8 else "; of quantised weights only FP8 with its scales is read"
        raise ConfigError(
            f"{folder}: the weights are quantised ({said}), e.g. {shown!a} {NAMES[stored.dtype]} "
            f"{stored.shape}{why}: {PLAIN_FOLDER}"
        )


def _inner(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those that ModelOpt's own file has one level below."""
    inner = settings.get("quantization")
    return {**settings, **(inner if isinstance(inner, dict) else {})}


def _weights_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The forms of the weights of each group of layers, as compressed-tensors and ModelOpt name them."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        return []
    found = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [weights for weights in found if isinstance(weights, dict)]


def _altered(settings: Mapping[str, Any]) -> bool:
    """Whether weights were also rotated or thinned out: code times scale would not be the weight."""
    sparsity, transforms = settings.get("sparsity_config"), settings.get("transform_config")
    sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    return sparse or bool(transforms)


def _bits(weights: Mapping[str, Any]) -> str:
    by = f" by {weights['strategy']}" if weights.get("strategy") else ""
    return f"{weights.get('num_bits')}-bit {weights.get('type')} weights{by}"


def _block(found: object) -> tuple[int, int] | None:
    match found.split("x") if isinstance(found, str) else found:
        case [rows, columns] if str(rows).isdecimal() and str(columns).isdecimal():
            return (int(rows), int(columns)) if int(rows) and int(columns) else None
    return None


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
