"""From a configuration to flags of SGLang, and what is refused on the way."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.config import (
    Config,
    ConfigError,
    Mamba,
    Model,
    Models,
    RolloutConfig,
    RolloutModelConfig,
    Serve,
)
from megatron_troll.launch import sglang_flags
from megatron_troll.launch.sglang_flags import check_address, flags_of
from megatron_troll.mcore.shape import shape_of
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import APERTUS, QWEN3_5_TEXT

MOE_SHAPE, DENSE_SHAPE = shape_of(MOE), shape_of(DENSE)


def config(
    rollout: dict[str, Any] | None = None, policy: dict[str, Any] | None = None, **serve: Any
) -> Config:
    return Config(
        name="run",
        seed=7,
        models=Models(policy=Model(**({"path": "/models/m"} | (policy or {})))),
        rollout=RolloutConfig(**(rollout or {})),
        serve=Serve(**serve),
    )


def test_on_gpus() -> None:
    asked = config(servers=2, tp=4, ep=4, memory_fraction=0.8, deterministic=True, routed_experts=True)
    flags = flags_of(asked, MOE_SHAPE, number=1, device="cuda")
    assert flags == {
        "model-path": "/models/m",
        "host": "127.0.0.1",
        "port": 30001,
        "dtype": "bfloat16",
        "grammar-backend": "none",
        "random-seed": 8,
        "tp-size": 4,
        "ep-size": 4,
        "base-gpu-id": 4,
        "mem-fraction-static": 0.8,
        "enable-deterministic-inference": True,
        "enable-return-routed-experts": True,
    }


def test_colocated_servers_can_give_memory_back() -> None:
    asked = config(rollout={"sglang": {"colocated": True}})
    assert flags_of(asked, MOE_SHAPE, 0, "cuda")["enable-memory-saver"] is True
    assert "enable-memory-saver" not in flags_of(asked, MOE_SHAPE, 0, "cpu")


def test_a_policy_without_weights_is_served_with_any_until_the_first_sync() -> None:
    assert flags_of(config(policy={"init": "random"}), MOE_SHAPE, 0, "cuda")["load-format"] == "dummy"


def test_a_rollout_model_is_what_is_served() -> None:
    asked = config()
    models = asked.models.model_copy(
        update={"rollout": RolloutModelConfig(path="/models/small", dtype="fp32")}
    )
    flags = flags_of(asked.model_copy(update={"models": models}), MOE_SHAPE, 0, "cuda")
    assert (flags["model-path"], flags["dtype"]) == ("/models/small", "float32")


def test_a_server_does_not_start_from_a_quantised_folder(tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(MOE | said))
    asked = config(policy={"path": str(tmp_path), "init": "random"})
    with pytest.raises(ConfigError, match=r"models\.policy\.path: .* is quantised .*mtroll convert hf2mcore"):
        flags_of(asked, MOE_SHAPE, 0, "cuda")
    models = asked.models.model_copy(update={"rollout": RolloutModelConfig(path="/models/small")})
    served = asked.model_copy(update={"models": models})
    assert flags_of(served, MOE_SHAPE, 0, "cuda")["model-path"] == "/models/small"


def test_on_a_cpu_one_may_set_what_is_chosen_for_it() -> None:
    flags = flags_of(config(flags={"max_running_requests": 4}, policy={"dtype": "fp32"}), MOE_SHAPE, 0, "cpu")
    assert (flags["device"], flags["dtype"], flags["max-running-requests"]) == ("cpu", "float32", 4)
    for impossible in ({"tp": 2}, {"deterministic": True}):
        with pytest.raises(ConfigError, match="on CPU"):
            flags_of(config(**impossible), MOE_SHAPE, 0, "cpu")


@pytest.mark.parametrize("flag", ["dtype", "--model-path", "kv_cache_dtype", "api-key"])
def test_a_flag_that_follows_from_a_key_is_refused(flag: str) -> None:
    asked = config({"kv_cache": "fp8_e4m3"}, force_unscaled_kv=True, flags={flag: "x"})
    with pytest.raises(ConfigError, match=r"serve\.flags"):
        flags_of(asked, MOE_SHAPE, 0, "cuda")


def test_linear_attention_only_where_there_is_some() -> None:
    asked = config(mamba=Mamba(ssm_dtype="bfloat16", cache_strategy="extra_buffer", memory_ratio=0.5))
    with pytest.raises(ConfigError, match="qwen3_moe has no linear attention"):
        flags_of(asked, MOE_SHAPE, 0, "cuda")
    flags = flags_of(asked, shape_of(NEXT), 0, "cuda")
    assert flags["mamba-ssm-dtype"] == "bfloat16"
    assert flags["mamba-radix-cache-strategy"] == "extra_buffer"
    assert flags["mamba-full-memory-ratio"] == 0.5


def test_layers_that_a_server_would_have_otherwise() -> None:
    first = QWEN3_5_TEXT | {"layer_types": ["full_attention", "linear_attention"] * 2}
    for there in (first, NEXT | {"layer_types": ["linear_attention"] * 4}):
        with pytest.raises(
            ConfigError, match=r"layer_types: SGLang .* has full attention in every n-th layer"
        ):
            flags_of(config(), shape_of(there), 0, "cuda")
    flags_of(config(), shape_of(QWEN3_5_TEXT), 0, "cuda")


def test_scalars_that_a_server_would_round() -> None:
    flags_of(config(policy={"dtype": "bf16"}), shape_of(APERTUS), 0, "cuda")
    with pytest.raises(ConfigError, match=r"dtype=fp32: SGLang .* keeps the scalars of xIELU in bf16"):
        flags_of(config(policy={"dtype": "fp32"}), shape_of(APERTUS), 0, "cuda")


def test_an_attention_factor_must_be_said_in_the_words_of_both_sides() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    for settings in ({}, {"attention_factor": 1.0, "attn_factor": 0.878248856}):
        flags_of(config(), shape_of(DENSE | {"rope_parameters": yarn | settings}), 0, "cuda")
    for settings in ({"attention_factor": 1.0}, {"attention_factor": 1.0, "attn_factor": 0.5}):
        shape = shape_of(DENSE | {"rope_parameters": yarn | settings})
        with pytest.raises(ConfigError, match=r"add attn_factor 0\.878248856 beside it"):
            flags_of(config(), shape, 0, "cuda")


FP8 = {"kv_cache": "fp8_e4m3"}


def scales(path: Path, layers: int = 4, ranks: int = 1, **changes: Any) -> str:
    rows = {rank: dict.fromkeys(range(layers), 0.05) for rank in range(ranks)}
    content = {
        "model_type": "qwen3",
        "hidden_size": 48,
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": rows},
    }
    path.write_text(json.dumps(content | changes))
    return str(path)


def test_an_fp8_cache_takes_its_scales_from_a_file(tmp_path: Path) -> None:
    file = scales(tmp_path / "scales.json")
    flags = flags_of(config(FP8, kv_scales=file), DENSE_SHAPE, 0, "cuda")
    assert (flags["kv-cache-dtype"], flags["quantization-param-path"]) == ("fp8_e4m3", file)


def test_an_fp8_cache_without_scales_has_to_be_wanted() -> None:
    with pytest.raises(ConfigError, match=r"uses 1 for all of them.*calibrate_fp8_kv.*force_unscaled_kv"):
        flags_of(config(FP8), DENSE_SHAPE, 0, "cuda")
    flags = flags_of(config(FP8, force_unscaled_kv=True), DENSE_SHAPE, 0, "cuda")
    assert "quantization-param-path" not in flags


def test_an_fp8_cache_on_a_cpu_needs_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(FP8, force_unscaled_kv=True)
    monkeypatch.setattr(sglang_flags, "_has_amx", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout.kv_cache=fp8_e4m3: .* Intel AMX"):
        flags_of(asked, DENSE_SHAPE, 0, "cpu")
    monkeypatch.setattr(sglang_flags, "_has_amx", lambda: True)
    assert flags_of(asked, DENSE_SHAPE, 0, "cpu")["kv-cache-dtype"] == "fp8_e4m3"


def test_a_family_that_sglang_reads_no_scales_for(tmp_path: Path) -> None:
    file = scales(tmp_path / "scales.json", model_type="qwen3_moe")
    with pytest.raises(ConfigError, match="for apertus, llama, qwen2, qwen3 only, not for qwen3_moe"):
        flags_of(config(FP8, kv_scales=file), MOE_SHAPE, 0, "cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 3}, "not one scale for each layer and GPU.* with 4 layers, served on 1 "),
        ({"ranks": 2}, "of hidden size 48 on 2 GPUs.* served on 1 "),
        ({"model_type": "llama"}, "is for llama"),
        ({"hidden_size": 64}, "is for qwen3 of hidden size 64 .* the policy is qwen3 of hidden size 48"),
        (
            {"kv_cache": {"dtype": "float8_e5m2", "scaling_factor": {}}},
            "not a file of scales: kv_cache.dtype",
        ),
        ({"kv_cache": {"scaling_factor": {0: {0: -1.0}}}}, "not a file of scales: .*greater than 0"),
        ({"kv_cache": {"scaling_factor": {0: {0: 0.0}}}}, "not a file of scales: .*greater than 0"),
        ({"kv_cache": {"scaling_factor": {0: {0: math.inf}}}}, "not a file of scales: .* finite"),
        ({"kv_cache": {"scaling_factor": {0: {0: math.nan}}}}, "not a file of scales"),
        ({"kv_cache": None}, "not a file of scales"),
    ],
)
def test_scales_of_something_else(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = scales(tmp_path / "scales.json", **changes)
    with pytest.raises(ConfigError, match=f"{words}.*calibrate with tools/calibrate_fp8_kv.py --tp 1"):
        flags_of(config(FP8, kv_scales=file), DENSE_SHAPE, 0, "cuda")


def test_scales_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="No such file or directory; calibrate with"):
        flags_of(config(FP8, kv_scales="/nowhere.json"), DENSE_SHAPE, 0, "cuda")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_no_key(host: str) -> None:
    check_address(Serve(host=host), None)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "node7"])
def test_any_other_address_needs_one(host: str) -> None:
    with pytest.raises(ConfigError, match="needs an API key"):
        check_address(Serve(host=host), None)
    check_address(Serve(host=host), "key")
