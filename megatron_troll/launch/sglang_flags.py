"""The flags of a configuration's SGLang servers."""

import ipaddress
import math
from pathlib import Path

from megatron_troll.checks import check_served
from megatron_troll.config import Config, ConfigError, Mamba, Model, Serve
from megatron_troll.launch.kv_scales import check_scales
from megatron_troll.mcore.layout import nearest_divisors
from megatron_troll.mcore.shape import ModelShape, Yarn

SGLANG = "0.5.23"
Flags = dict[str, str | int | float | bool]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Families whose model in this SGLang reads a file of KV scales; the others refuse to start with one.
READS_SCALES = ("apertus", "llama", "qwen2", "qwen3")
# Disables what has no kernel without CUDA, and limits what would take all of a machine's memory.
ON_CPU: Flags = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "cuda-graph-backend-decode": "disabled",
    "cuda-graph-backend-prefill": "disabled",
    "disable-overlap-schedule": True,
    "skip-server-warmup": True,
    "sleep-on-idle": True,
    "max-total-tokens": 32768,
    "max-running-requests": 32,
}


def flags_of(config: Config, shape: ModelShape, number: int, device: str) -> Flags:
    """The flags of server `number` on "cuda" or "cpu", without its API key. Raises ConfigError for settings
    that a server would refuse or silently change."""
    serve, model = config.serve, config.models.drawing
    check_rope(shape)
    check_served(config)
    check_layers(shape)
    _check_scalars(shape, model)
    flags: Flags = {
        "model-path": str(Path(model.path).absolute()),
        "host": serve.host,
        "port": serve.port + number,
        "dtype": DTYPES[model.dtype],
        "grammar-backend": "none",
        "random-seed": config.seed + number,
    }
    if model.init == "random":
        flags["load-format"] = "dummy"
    if device == "cpu":
        flags |= _on_cpu(serve, config.rollout.kv_cache)
    else:
        check_sizes(serve, shape)
        flags |= {"tp-size": serve.tp, "ep-size": serve.ep, "base-gpu-id": number * serve.tp}
        if config.rollout.sglang.colocated:
            flags["enable-memory-saver"] = True
    if serve.memory_fraction is not None:
        flags["mem-fraction-static"] = serve.memory_fraction
    if serve.deterministic:
        flags["enable-deterministic-inference"] = True
    if serve.routed_experts:
        flags["enable-return-routed-experts"] = True
    flags |= kv_cache(config, shape)
    flags |= _mamba(serve.mamba, shape)
    return _with_own(flags, serve.flags)


def check_sizes(serve: Serve, shape: ModelShape) -> None:
    """Raises ConfigError if the model cannot be sharded over the GPUs of one server."""
    if shape.heads % serve.tp:
        nearest = " or ".join(map(str, nearest_divisors(shape.heads, serve.tp)))
        raise ConfigError(
            f"serve.tp={serve.tp}: {shape.heads} attention heads cannot be divided by it; set it to {nearest}"
        )
    if serve.tp % serve.ep or shape.experts % serve.ep:
        raise ConfigError(
            f"serve.ep={serve.ep}: must divide serve.tp={serve.tp} and the model's {shape.experts} experts"
        )


def check_rope(shape: ModelShape) -> None:
    """Raises ConfigError if a server would scale attention otherwise than the trainer, as YaRN's keys say."""
    yarn = shape.rope_scaling
    if isinstance(yarn, Yarn) and not math.isclose(yarn.scale, yarn.scale_in_sglang, rel_tol=1e-6):
        factor = yarn.scale / yarn.inferred
        raise ConfigError(
            f"config.json: attention_factor {yarn.scale:g} of its RoPE is unknown to SGLang {SGLANG}, which "
            f"takes {yarn.scale_in_sglang:g}: add attn_factor {factor:.9g} beside it, or use "
            "rollout.engine=inprocess"
        )


def check_layers(shape: ModelShape) -> None:
    """Raises ConfigError if a server would have other types of layers: it reads an interval, not types."""
    if shape.linear is None:
        return
    full = [i + 1 for i, kind in enumerate(shape.layer_types) if kind == "full_attention"]
    if not full or full != list(range(full[0], shape.layers + 1, full[0])):
        raise ConfigError(
            f"config.json: layer_types: SGLang {SGLANG} has full attention in every n-th layer "
            f"(full_attention_interval), and here it is in layers {full}: use rollout.engine=inprocess"
        )


def _check_scalars(shape: ModelShape, model: Model) -> None:
    if shape.activation == "xielu" and model.dtype != "bf16":
        raise ConfigError(
            f"dtype={model.dtype}: SGLang {SGLANG} keeps the scalars of xIELU in bf16, and would draw from "
            "another model: set dtype=bf16, or rollout.engine=inprocess"
        )


def check_address(serve: Serve, key_file: str | None) -> None:
    """Raises ConfigError if other machines could reach a server that needs no key."""
    if key_file is None and not _is_loopback(serve.host):
        raise ConfigError(
            f"serve.host={serve.host}: a server that other machines reach needs an API key: put one in a "
            "file of mode 600 and name it in rollout.sglang.api_key_file"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _on_cpu(serve: Serve, kv_cache: str) -> Flags:
    if serve.tp > 1 or serve.ep > 1:
        raise ConfigError(f"serve.tp={serve.tp}, serve.ep={serve.ep}: a server on CPU has one rank")
    if serve.deterministic:
        raise ConfigError("serve.deterministic: SGLang has no deterministic attention on CPU")
    if kv_cache != "auto" and not _has_amx():
        raise ConfigError(
            f"rollout.kv_cache={kv_cache}: on CPU SGLang keeps an FP8 cache only with Intel AMX, which this "
            "machine does not have: set rollout.kv_cache=auto"
        )
    return ON_CPU


def _has_amx() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_tile" in cpuinfo.read_text().split()


def kv_cache(config: Config, shape: ModelShape) -> Flags:
    """Flags of the KV cache. Raises ConfigError if it is FP8 without scales for this model."""
    check_kv_cache(config, shape)
    serve, dtype = config.serve, config.rollout.kv_cache
    if dtype == "auto":
        return {}
    if serve.kv_scales is None or serve.force_unscaled_kv:
        return {"kv-cache-dtype": dtype}
    path = Path(serve.kv_scales)
    check_scales(path, shape, serve.tp)
    return {"kv-cache-dtype": dtype, "quantization-param-path": str(path.absolute())}


def check_kv_cache(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError if an FP8 cache has no scales, or the model family cannot use any. Reads no file."""
    serve, dtype = config.serve, config.rollout.kv_cache
    if dtype == "auto" or serve.force_unscaled_kv:
        return
    if shape.family not in READS_SCALES:
        raise ConfigError(
            f"rollout.kv_cache={dtype}: SGLang {SGLANG} reads calibrated scales for "
            f"{', '.join(READS_SCALES)} only, not for {shape.family}: leave the cache in the weights' "
            "dtype, or accept scales of 1 with serve.force_unscaled_kv=true"
        )
    if serve.kv_scales is None:
        raise ConfigError(
            f"rollout.kv_cache={dtype}: without calibrated scales SGLang silently uses 1 for all of "
            "them: make some with tools/calibrate_fp8_kv.py and name the file in serve.kv_scales, or "
            "accept that with serve.force_unscaled_kv=true"
        )


def _mamba(mamba: Mamba | None, shape: ModelShape) -> Flags:
    if mamba is None:
        return {}
    if shape.linear is None:
        raise ConfigError(f"serve.mamba: {shape.family} has no linear attention")
    return {
        "mamba-ssm-dtype": mamba.ssm_dtype,
        "mamba-radix-cache-strategy": mamba.cache_strategy,
        "mamba-full-memory-ratio": mamba.memory_ratio,
    }


def _with_own(flags: Flags, own: Flags) -> Flags:
    """Add `serve.flags`. They may replace the defaults for a device, but no flag that other keys set."""
    named = {key.lstrip("-").replace("_", "-"): value for key, value in own.items()}
    taken = sorted(named.keys() & (flags.keys() - ON_CPU.keys()))
    if taken:
        raise ConfigError(f"serve.flags: {', '.join(taken)} are set by other keys of the configuration")
    if {"api-key", "admin-api-key", "config"} & named.keys():
        raise ConfigError("serve.flags: keys belong in the file of rollout.sglang.api_key_file")
    return flags | named
