"""What config.json means, and what is refused by the name of its key."""

import json
import re
from typing import Any

import pytest

from megatron_troll.config import Layout
from megatron_troll.config.load import PRESETS
from megatron_troll.mcore.layout import check_layout
from megatron_troll.mcore.shape import LinearAttention, shape_of
from tests.dist.tiny import DENSE, MOE, NEXT

QWEN3_NEXT_80B_A3B = PRESETS / "models" / "Qwen3-Next-80B-A3B-Instruct" / "config.json"


def test_the_published_hybrid() -> None:
    shape = shape_of(json.loads(QWEN3_NEXT_80B_A3B.read_text()))
    assert shape.layers == 48
    assert shape.layer_types == (*["linear_attention"] * 3, "full_attention") * 12
    assert shape.linear == LinearAttention(key_heads=16, value_heads=32, key_dim=128, value_dim=128, conv=4)
    assert (shape.shared_expert_ffn, shape.rotary_fraction, shape.rope_theta) == (512, 0.25, 1e7)
    assert shape.output_gate
    assert shape.zero_centred_norms


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


REFUSED: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    (NEXT, {"layer_types": ["mamba"] * 4}, "layer_types: 'mamba' is not supported"),
    (NEXT, {"num_hidden_layers": 5}, "layer_types names 4 layers, num_hidden_layers is 5"),
    (NEXT, {"layer_types": None, "full_attention_interval": 0}, "full_attention_interval is 0"),
    (NEXT, {"linear_num_value_heads": 6}, "linear_num_value_heads (6) must be a multiple of"),
    (NEXT, {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
    (NEXT, {"rope_parameters": {"rope_theta": 1.0, "rope_type": "yarn"}}, "rope type 'yarn'"),
    (NEXT, {"mlp_only_layers": [1]}, "mlp_only_layers: [1] is not supported (only [])"),
    (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step: 2 is not supported (only 1)"),
    (MOE, {"attention_bias": True}, "attention_bias: True is not supported (only False)"),
    (DENSE, {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
    (DENSE, {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported (only 'silu')"),
    (DENSE, {"layer_types": ["linear_attention"] * 4}, "layer_types: 'linear_attention' is not supported"),
    (DENSE, {"hidden_size": "48"}, "hidden_size '48' must be a whole number above 0"),
    (DENSE, {"num_hidden_layers": None}, "num_hidden_layers None must be a whole number above 0"),
    (MOE, {"num_experts": 0}, "num_experts 0 must be a whole number above 0"),
    (DENSE, {"model_type": "llama"}, "model_type 'llama' is not supported (qwen3, qwen3_moe, qwen3_next)"),
)


@pytest.mark.parametrize(("config", "changed", "message"), REFUSED)
def test_what_is_not_built_is_refused(config: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        shape_of(config | changed)


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
