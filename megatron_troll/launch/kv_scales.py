"""The file of scales for an FP8 KV cache, in the form that SGLang reads (--quantization-param-path)."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from megatron_troll.config import ConfigError
from megatron_troll.mcore.shape import ModelShape


class KVCache(BaseModel):
    """scaling_factor: a scale for each layer of each tensor-parallel rank; keys and values share it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    dtype: Literal["float8_e4m3fn"] = "float8_e4m3fn"
    scaling_factor: dict[int, dict[int, PositiveFloat]]


class KVScales(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model_type: str
    kv_cache: KVCache


def check_scales(path: Path, shape: ModelShape, tp: int) -> None:
    """Raises ConfigError unless the file holds a scale for every layer and rank: SGLang says of a wrong one
    no more than a line in its log, and takes 1."""
    try:
        scales = KVScales.model_validate_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"serve.kv_scales: {path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"serve.kv_scales: {path} is no file of scales: {error}") from error
    found = {rank: set(row) for rank, row in scales.kv_cache.scaling_factor.items()}
    if scales.model_type != shape.family or found != {rank: set(range(shape.layers)) for rank in range(tp)}:
        raise ConfigError(
            f"serve.kv_scales: {path} is for {scales.model_type} on {len(found)} GPUs; the policy is "
            f"{shape.family} with {shape.layers} layers, served on serve.tp={tp}: calibrate again with "
            f"--tp {tp}"
        )
