"""What config.json means, and what is refused by the name of its key."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_troll.config import ConfigError, Layout
from megatron_troll.config.load import PRESETS
from megatron_troll.mcore.layout import check_layout
from megatron_troll.mcore.shape import LinearAttention, read_shape, shape_of
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import (
    APERTUS,
    LLAMA,
    LLAMA_TIED,
    QWEN2,
    QWEN3_5_MOE,
    QWEN3_5_TEXT,
    SMOLLM3,
)

QWEN3_NEXT_80B_A3B = PRESETS / "models" / "Qwen3-Next-80B-A3B-Instruct" / "config.json"


def test_the_published_hybrid() -> None:
    shape = shape_of(json.loads(QWEN3_NEXT_80B_A3B.read_text()))
    assert shape.layers == 48
    assert shape.layer_types == (*["linear_attention"] * 3, "full_attention") * 12
    assert shape.linear == LinearAttention(key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv=4)
    assert (shape.shared_expert_ffn, shape.rotary_fraction, shape.rope_theta) == (512, 0.25, 1e7)
    assert shape.output_gate
    assert shape.zero_centred_norms


def in_text(**changed: Any) -> dict[str, Any]:
    """`text_config` of a model with a vision tower, with some keys changed."""
    return {"text_config": QWEN3_5_MOE["text_config"] | changed}


def in_rope(**changed: Any) -> dict[str, Any]:
    return {"rope_parameters": QWEN3_5_TEXT["rope_parameters"] | changed}


def test_a_text_config_is_read_like_the_config_of_the_text_alone() -> None:
    beside_vision, alone = shape_of(QWEN3_5_MOE), shape_of(QWEN3_5_MOE["text_config"])
    assert (beside_vision.family, alone.family) == ("qwen3_5_moe", "qwen3_5_moe_text")
    assert replace(alone, family="qwen3_5_moe") == beside_vision
    assert (alone.ffn, alone.shared_expert_ffn, alone.rotary_fraction) == (0, 56, 0.25)


def test_settings_of_quantisation_are_left_to_those_who_read_weights() -> None:
    for config in (QWEN3_5_MOE, QWEN3_5_TEXT):
        assert shape_of(config | {"quantization_config": {"quant_method": "fp8"}}) == shape_of(config)


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}])
def test_the_head_is_tied_as_said_beside_the_text(keys: dict[str, Any]) -> None:
    text = without(QWEN3_5_MOE["text_config"], "tie_word_embeddings") | keys
    assert shape_of(QWEN3_5_MOE | {"tie_word_embeddings": True, "text_config": text}).tied


def test_the_auxiliary_loss_of_a_config_is_not_read() -> None:
    assert shape_of(QWEN3_5_MOE | in_text(router_aux_loss_coef=1.0)) == shape_of(QWEN3_5_MOE)


def test_layer_types_come_before_the_interval() -> None:
    shape = shape_of(NEXT | {"full_attention_interval": 4})
    assert shape.layer_types == ("linear_attention", "full_attention") * 2


@pytest.mark.parametrize("config", [DENSE, MOE])
def test_other_families_have_full_attention_only(config: dict[str, Any]) -> None:
    shape = shape_of(config)
    assert shape.layer_types == ("full_attention",) * 4
    assert shape.linear is None
    assert not shape.output_gate
    assert not shape.zero_centred_norms
    assert (shape.shared_expert_ffn, shape.rotary_fraction) == (0, 1.0)


INTERVAL = "full_attention_interval 4 gives other layers than layer_types, and programs differ"
REFUSED: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    (NEXT, {"layer_types": ["mamba"] * 4}, "layer_types: 'mamba' is not supported"),
    (NEXT, {"num_hidden_layers": 5}, "layer_types names 4 layers, num_hidden_layers is 5"),
    (
        NEXT,
        {"layer_types": None, "full_attention_interval": 0},
        "full_attention_interval 0 must be a whole",
    ),
    (NEXT, {"linear_num_value_heads": 6}, "linear_num_value_heads (6) must be a multiple of"),
    (NEXT, {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
    (NEXT, {"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn"}}, "rope_parameters: 'factor' is"),
    (NEXT, {"mlp_only_layers": [1]}, "mlp_only_layers: [1] is not supported (only [])"),
    (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported (only 1)"),
    (MOE, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (DENSE, {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
    (DENSE, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (DENSE, {"layer_types": ["linear_attention"] * 4}, "layer_types: 'linear_attention' is not supported"),
    (DENSE, {"hidden_size": "48"}, "hidden_size '48' must be a whole number above 0"),
    (DENSE, {"num_hidden_layers": None}, "num_hidden_layers None must be a whole number above 0"),
    (MOE, {"num_experts": 0}, "num_experts 0 must be a whole number above 0"),
    (DENSE, {"num_hidden_layers": True}, "num_hidden_layers True must be a whole number above 0"),
    (DENSE, {"head_dim": None}, "head_dim None must be a whole number above 0"),
    (
        DENSE,
        {"max_position_embeddings": 1e3},
        "max_position_embeddings 1000.0 must be a whole number",
    ),
    (NEXT, {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim 0 must be a whole number above 0"),
    (DENSE, {"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6' must be a number above 0"),
    (DENSE, {"initializer_range": -1.0}, "initializer_range -1.0 must be a number above 0"),
    (DENSE, {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false' must be true or false"),
    (MOE, {"norm_topk_prob": 1}, "norm_topk_prob 1 must be true or false"),
    (DENSE, {"rope_parameters": [1]}, "rope_parameters '[1]' must be an object or null"),
    (DENSE, {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta '1e6' must be a number above 0"),
    (DENSE, {"rope_scaling": {"type": "su"}, "rope_theta": 1e4}, "rope_scaling: rope type 'su' is not supp"),
    (DENSE, {"layer_types": 4}, "layer_types '4' must be a list"),
    (DENSE, {"layer_types": [[]] * 4}, "layer_types: [] is not supported"),
    (
        DENSE,
        {"num_key_value_heads": 3},
        "num_attention_heads (8) must be a multiple of",
    ),
    (MOE, {"num_experts": 10**19}, "num_experts 10000000000000000000 is above 10000: is it a typo?"),
    (DENSE, {"hidden_size": 2**31}, "hidden_size 2147483648 is above 2147483647"),
    (MOE, {"num_local_experts": 4}, "num_local_experts is 4, num_experts 8: give one"),
    (MOE, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and there are 8 experts"),
    (MOE, {"num_experts_per_tok": 1}, "num_experts_per_tok 1 with norm_topk_prob true is not supported"),
    (MOE, {"partial_rotary_factor": 0.5}, "whole heads are rotated in qwen3_moe"),
    (
        DENSE,
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 is not supported: whole heads are rotated in qwen3",
    ),
    (DENSE, {"model_type": "mistral"}, "model_type 'mistral' is not supported (apertus, llama, "),
    (DENSE, {"model_type": ["qwen3"]}, "model_type ['qwen3'] is not supported (apertus, llama, "),
    (DENSE, {"head_dim": 15}, "head_dim 15 must be even"),
    (DENSE, {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported (only 0)"),
    (LLAMA, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias: True is not supported (only False)"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp: 2 is not supported (only 1)"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (LLAMA, {"hidden_size": 50}, "hidden_size (50) must be a multiple of num_attention_heads (8)"),
    (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads (8) must be a multiple of"),
    (QWEN2, {"use_sliding_window": True}, "use_sliding_window: True is not supported (only False)"),
    (QWEN2, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "layer_types: 'sliding_attention' is not supported"),
    (QWEN2, {"head_dim": None}, "head_dim None must be a whole number above 0"),
    (SMOLLM3, {"use_sliding_window": True}, "use_sliding_window: True is not supported (only False)"),
    (SMOLLM3, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (SMOLLM3, {"mlp_bias": True}, "mlp_bias: True is not supported (only False)"),
    (SMOLLM3, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers, num_hidden_layers is 4"),
    (SMOLLM3, {"no_rope_layers": [1, 0, 2, 0]}, "no_rope_layers '[1, 0, 2, 0]' must be a list of 1 (RoPE)"),
    (SMOLLM3, {"no_rope_layers": 4}, "no_rope_layers '4' must be a list of 1 (RoPE) and 0 (none)"),
    (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval 0 must be a"),
    (APERTUS, {"hidden_act": "silu"}, "hidden_act: 'silu' is not supported (only 'xielu')"),
    (APERTUS, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (APERTUS, {"mlp_bias": True}, "mlp_bias: True is not supported (only False)"),
    (APERTUS, {"post_norm": True}, "post_norm: True is not supported (only False)"),
    (APERTUS, {"qk_norm": False}, "qk_norm: False is not supported (only True)"),
    (
        QWEN3_5_TEXT,
        {"model_type": "qwen3_5"},
        "'text_config' is missing (without a vision tower, it is a qwen",
    ),
    (QWEN3_5_MOE, {"text_config": [1]}, "text_config '[1]' must be an object or null"),
    (QWEN3_5_MOE, in_text(model_type="qwen3_5_text"), "text_config: model_type: 'qwen3_5_text' is not supp"),
    (QWEN3_5_MOE, {"tie_word_embeddings": True}, "is True beside text_config (absent: false) and False in"),
    (QWEN3_5_MOE, in_text(hidden_size="4"), "config.json: text_config: hidden_size '4' must be a whole"),
    (QWEN3_5_MOE, in_text(use_sliding_window=True), "text_config: use_sliding_window: True is not supported"),
    (QWEN3_5_MOE, in_text(norm_topk_prob=False), "text_config: norm_topk_prob: False is not supported"),
    (QWEN3_5_MOE, in_text(mlp_only_layers=[1]), "text_config: mlp_only_layers: [1] is not supported"),
    (
        QWEN3_5_MOE,
        in_text(quantization_config={"bits": 4}),
        "text_config: quantization_config: {'bits': 4} i",
    ),
    (QWEN3_5_TEXT, {"full_attention_interval": 4}, INTERVAL),
    (QWEN3_5_TEXT, {"attn_output_gate": False}, "attn_output_gate: False is not supported (only True)"),
    (QWEN3_5_TEXT, {"output_gate_type": "sigmoid"}, "output_gate_type: 'sigmoid' is not supported"),
    (QWEN3_5_TEXT, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (QWEN3_5_TEXT, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (
        QWEN3_5_TEXT,
        {"layer_types": ["sliding_attention"] * 4},
        "layer_types: 'sliding_attention' is not supp",
    ),
    (
        QWEN3_5_TEXT,
        in_rope(mrope_section=[2, 1]),
        "rope_parameters: mrope_section '[2, 1]' must be three who",
    ),
    (QWEN3_5_TEXT, in_rope(mrope_section=[11, 11, 10]), "that add up to the 4 pairs of dimensions that are"),
    (QWEN3_5_TEXT, in_rope(mrope_interleaved=1), "rope_parameters: mrope_interleaved 1 must be true or fal"),
    (QWEN3_5_TEXT, in_rope(rope_type="mrope"), "rope_parameters: rope type 'mrope' is not supported"),
    (QWEN3_5_TEXT, in_rope(rope_type="yarn", factor=2, beta=1), "'beta' is no key of rope type 'yarn'"),
    (
        APERTUS,
        {"rope_parameters": None, "rope_theta": 5e5},
        "rope_theta says): give rope_parameters",
    ),
)


@pytest.mark.parametrize(("config", "changed", "message"), REFUSED)
def test_what_is_not_built_is_refused(config: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        shape_of(config | changed)


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    "config",
    [
        without(DENSE, "head_dim"),
        without(MOE, "head_dim"),
        without(DENSE, "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings"),
        without(MOE, "norm_topk_prob"),
        without(NEXT, "norm_topk_prob", "layer_types", "rope_parameters") | {"rope_theta": 1e4},
        without(NEXT, "rope_parameters") | {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        DENSE | {"rope_scaling": {"rope_theta": 5.0}},
        without(DENSE, "rope_parameters") | {"rope_theta": 7.0, "rope_scaling": None},
        without(MOE, "num_experts") | {"num_local_experts": 4},
        LLAMA,
        LLAMA_TIED,
        LLAMA | {"head_dim": None, "num_key_value_heads": None},
        LLAMA | {"head_dim": 32, "rope_scaling": None},
        without(LLAMA, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"),
        QWEN2,
        without(QWEN2, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings") | {"head_dim": 32},
        SMOLLM3,
        without(SMOLLM3, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "no_rope_layers"),
        without(SMOLLM3, "no_rope_layers") | {"no_rope_layer_interval": 2},
        SMOLLM3 | {"no_rope_layers": None, "no_rope_layer_interval": 1},
        SMOLLM3 | {"no_rope_layers": [1, 1, 0, 1, 0, 0]},
        APERTUS,
        without(APERTUS, "rms_norm_eps", "max_position_embeddings", "num_key_value_heads"),
        QWEN3_5_TEXT,
        without(QWEN3_5_TEXT, "rms_norm_eps", "max_position_embeddings", "layer_types", "rope_parameters")
        | {"rope_theta": 1e4},
        QWEN3_5_MOE["text_config"],
    ],
    ids=str,
)
def test_an_absent_key_means_what_it_means_to_hugging_face(config: dict[str, Any]) -> None:
    there: Any = AutoConfig.for_model(**json.loads(json.dumps(config)))
    shape = shape_of(config)
    head_dim = getattr(there, "head_dim", there.hidden_size // there.num_attention_heads)
    assert (shape.head_dim, shape.kv_heads) == (head_dim, there.num_key_value_heads)
    assert shape.tied == there.tie_word_embeddings
    assert (shape.norm_eps, shape.init_std) == (there.rms_norm_eps, there.initializer_range)
    assert shape.max_positions == there.max_position_embeddings
    assert shape.rope_theta == there.rope_parameters["rope_theta"]
    assert shape.rotary_fraction == there.rope_parameters.get("partial_rotary_factor", 1.0)
    assert shape.layer_types == tuple(getattr(there, "layer_types", shape.layer_types))
    layers = range(shape.layers)
    rotated = getattr(there, "no_rope_layers", [1] * shape.layers)
    assert [shape.rotates(layer) for layer in layers] == [bool(rotated[layer]) for layer in layers]
    if shape.experts:
        # Without that key in its config, a family always norms.
        norm = getattr(there, "norm_topk_prob", True)
        assert (shape.experts, shape.norm_topk) == (there.num_experts, norm)


REQUIRED = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "rope_parameters")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_key_that_hugging_face_would_guess_is_asked_for(key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(without(DENSE, key)))
    with pytest.raises(ConfigError, match=f"config.json: (no rope_theta|'{key}' is missing)"):
        read_shape(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 100_000, "\x00"])
def test_a_config_that_is_none_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: (not valid JSON|it holds no keys)"):
        read_shape(tmp_path)


def test_heads_of_linear_attention_must_divide_by_the_ranks_they_are_spread_over() -> None:
    with pytest.raises(
        ValueError, match=r"key heads of linear attention \(4\) cannot be divided by tp x cp \(8\)"
    ):
        check_layout(shape_of(NEXT), Layout(tp=2, cp=4, ep=2))


@pytest.mark.parametrize(("fields", "softcap"), [({}, None), ({"final_logit_softcapping": 30.0}, 30.0)])
def test_a_soft_cap_is_read(fields: dict[str, Any], softcap: float | None) -> None:
    assert shape_of(DENSE | fields).softcap == softcap


@pytest.mark.parametrize("softcap", [0, -5.0])
def test_a_soft_cap_must_be_above_0(softcap: float) -> None:
    with pytest.raises(ValueError, match=r"config.json: final_logit_softcapping .* must be above 0"):
        shape_of(DENSE | {"final_logit_softcapping": softcap})
