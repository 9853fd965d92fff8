"""The file of scales for an FP8 KV cache, in the format that SGLang reads (--quantization-param-path)."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from megatron_troll.config import ConfigError
from megatron_troll.mcore.shape import ModelShape


class KVCache(BaseModel):
    """Scales of the cache. scaling_factor: tensor-parallel rank -> layer -> scale of its keys and values."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    dtype: Literal["float8_e4m3fn"] = "float8_e4m3fn"
    scaling_factor: dict[int, dict[int, PositiveFloat]]


class KVScales(BaseModel):
    """The whole file. hidden_size, which SGLang ignores, distinguishes models of one family and depth."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model_type: str
    hidden_size: int
    kv_cache: KVCache


def check_scales(path: Path, shape: ModelShape, tp: int) -> None:
    """Raises ConfigError unless the file holds a scale for every layer and rank: for a wrong file SGLang
    only logs one line, and uses 1."""
    again = f"calibrate with tools/calibrate_fp8_kv.py --tp {tp}"
    try:
        scales = KVScales.model_validate_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"serve.kv_scales: {path}: {error.strerror}; {again}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"serve.kv_scales: {path} is not a file of scales: {again}") from error
    except ValidationError as error:
        at, why = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise ConfigError(
            f"serve.kv_scales: {path} is not a file of scales: {'.'.join(map(str, at))}: {why}; {again}"
        ) from error
    found = {rank: set(row) for rank, row in scales.kv_cache.scaling_factor.items()}
    theirs = f"{scales.model_type} of hidden size {scales.hidden_size} on {len(found)} GPUs"
    ours = f"{shape.family} of hidden size {shape.hidden} with {shape.layers} layers, served on {tp}"
    if (scales.model_type, scales.hidden_size) != (shape.family, shape.hidden):
        raise ConfigError(f"serve.kv_scales: {path} is for {theirs}; the policy is {ours}: {again}")
    if found != {rank: set(range(shape.layers)) for rank in range(tp)}:
        raise ConfigError(
            f"serve.kv_scales: {path} is not one scale for each layer and GPU; it is for {theirs}, and the "
            f"policy is {ours} (serve.tp): {again}"
        )
