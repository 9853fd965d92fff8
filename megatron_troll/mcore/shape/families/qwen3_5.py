"""Qwen3.5 and 3.6, dense and with experts: the language model, alone or beside a vision tower.

Layers as in Qwen3-Next. A position of text is the same on the three axes of the rotary embedding, so that
which dimensions belong to which axis (`mrope_section`, `mrope_interleaved`) does not matter.
"""

from dataclasses import replace
from typing import Any

from megatron_troll.mcore.shape.common import decoder
from megatron_troll.mcore.shape.experts import with_experts
from megatron_troll.mcore.shape.families import qwen3
from megatron_troll.mcore.shape.families.qwen3_next import hybrid_types, linear_attention
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import LayerType, ModelShape

# Model types with a vision tower, and that of their `text_config`.
TEXT_TYPES = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
MROPE = ("mrope_section", "mrope_interleaved")


def read(fields: Fields) -> ModelShape:
    family = fields.config["model_type"]
    text = _text_of(fields, family) if family in TEXT_TYPES else fields
    _check(text)
    head_dim = text.size("head_dim")
    with_moe = "moe" in family
    shape = replace(
        decoder(
            _without_mrope(text),
            head_dim,
            types=_types(text),
            partial=0.25,
            ffn=0 if with_moe else None,
        ),
        linear=linear_attention(text),
        output_gate=True,
        zero_centred_norms=True,
    )
    _check_mrope(text, int(head_dim * shape.rotary_fraction) // 2)
    if not with_moe:
        return shape
    return replace(
        with_experts(text, shape, text.size("num_experts"), norm_topk=True),
        shared_expert_ffn=text.size("shared_expert_intermediate_size"),
    )


def _text_of(fields: Fields, family: str) -> Fields:
    """The keys of `text_config`, of a model type that names the whole model."""
    config = fields.mapping("text_config")
    if not config:
        raise fields.error(f"'text_config' is missing (without a vision tower, it is a {TEXT_TYPES[family]})")
    text = Fields(config, f"{fields.where}: text_config")
    text.only("model_type", TEXT_TYPES[family])
    text.only("quantization_config", None)  # settings are read beside it
    # Where text_config has no such key, all programs read the one beside it.
    tied = fields.flag("tie_word_embeddings", False)
    if tied != text.flag("tie_word_embeddings", tied):
        raise fields.error(
            f"tie_word_embeddings is {tied} beside text_config (absent: false) and {not tied} in it, and "
            "programs differ in which they read: give both the same"
        )
    return Fields({**config, "model_type": family, "tie_word_embeddings": tied}, text.where)


def _types(text: Fields) -> tuple[LayerType, ...]:
    types = hybrid_types(text)
    key = "full_attention_interval"
    if key in text.config and types != hybrid_types(Fields({**text.config, "layer_types": None}, text.where)):
        raise text.error(
            f"{key} {text.config[key]} gives other layers than layer_types, and programs differ in which "
            "they read (transformers the types, SGLang the interval)"
        )
    return types


def _check(text: Fields) -> None:
    """Refuse what no model of the family has."""
    qwen3.check(text)
    text.only("norm_topk_prob", True)
    text.only("attn_output_gate", True)
    text.only("output_gate_type", "swish", "silu", None)


def _check_mrope(text: Fields, pairs: int) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        rope = Fields(text.mapping(key), f"{text.where}: {key}")
        rope.flag("mrope_interleaved", True)
        section: Any = rope.config.get("mrope_section")
        if section is None:
            continue
        whole = isinstance(section, list | tuple) and all(type(n) is int and n >= 0 for n in section)
        if not whole or len(section) != 3 or sum(section) != pairs:
            raise rope.error(
                f"mrope_section {str(section)[:40]!a} must be three whole numbers that add up to the {pairs} "
                "pairs of dimensions that are rotated"
            )


def _without_mrope(text: Fields) -> Fields:
    kept = {
        key: {name: value for name, value in text.mapping(key).items() if name not in MROPE}
        for key in ("rope_scaling", "rope_parameters")
        if text.config.get(key) is not None
    }
    return Fields({**text.config, **kept}, text.where)
