"""The keys of config.json that all families share."""

from typing import Any

from megatron_troll.mcore.shape.fields import Fields, positive
from megatron_troll.mcore.shape.model_shape import LayerType, ModelShape
from megatron_troll.mcore.shape.rope import read_fraction, read_scaling, read_theta, whole_heads


def decoder(
    fields: Fields,
    head_dim: int,
    *,
    groups: int | None = None,
    types: tuple[LayerType, ...] | None = None,
    tied: bool = False,
    norm_eps: float = 1e-6,
    max_positions: int = 32768,
    partial: float | None = None,
    ffn: int | None = None,
) -> ModelShape:
    """The shape of a model whose layers have attention and a dense MLP, as in Qwen3; a reader replaces what
    differs in its family.

    groups     number of key-value heads; None: their key must be there
    types      type of each layer; None: full attention in all
    tied, norm_eps, max_positions   what an absent key means
    partial    the same for the rotated fraction of a head; None: whole heads are rotated
    ffn        size of the dense MLP, 0 if no layer has one; None: its key must be there
    """
    groups = groups or fields.size("num_key_value_heads")
    _check_heads(fields, head_dim, groups)
    fields.only("attention_dropout", 0, None)
    positions = fields.size("max_position_embeddings", max_positions)
    every: tuple[LayerType, ...] = ("full_attention",) * fields.size("num_hidden_layers")
    return ModelShape(
        family=fields.config["model_type"],
        vocab=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        layer_types=types or layer_types(fields, every, ("full_attention",)),
        heads=fields.size("num_attention_heads"),
        kv_heads=groups,
        head_dim=head_dim,
        ffn=fields.size("intermediate_size") if ffn is None else ffn,
        experts=0,
        experts_per_token=0,
        expert_ffn=0,
        norm_topk=False,
        tied=fields.flag("tie_word_embeddings", tied),
        rope_theta=read_theta(fields),
        norm_eps=fields.number("rms_norm_eps", norm_eps),
        init_std=fields.number("initializer_range", 0.02),
        max_positions=positions,
        softcap=_softcap(fields),
        rotary_fraction=_fraction(fields, head_dim, partial),
        rope_scaling=read_scaling(fields, positions),
    )


def _check_heads(fields: Fields, head_dim: int, groups: int) -> None:
    heads = fields.size("num_attention_heads")
    if heads % groups:
        raise fields.error(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})"
        )
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} must be even: rotation takes dimensions in pairs")


def _fraction(fields: Fields, head_dim: int, partial: float | None) -> float:
    if partial is not None:
        return read_fraction(fields, head_dim, partial)
    whole_heads(fields)
    return 1.0


def kv_heads(fields: Fields) -> int:
    """`num_key_value_heads`; as many as query heads if it is absent or null."""
    absent = fields.config.get("num_key_value_heads") is None
    return fields.size("num_attention_heads" if absent else "num_key_value_heads")


def divided_head_dim(fields: Fields) -> int:
    """`head_dim`; hidden_size / num_attention_heads if it is absent."""
    if "head_dim" in fields.config:
        return fields.size("head_dim")
    return fields.size("hidden_size") // fields.size("num_attention_heads")


def layer_types(
    fields: Fields, default: tuple[LayerType, ...], known: tuple[LayerType, ...]
) -> tuple[LayerType, ...]:
    """`layer_types`, of which the family has the `known` ones; `default` if it is absent or null."""
    types: Any = fields.config.get("layer_types")
    if types is None:
        return default
    if not isinstance(types, list | tuple):
        raise fields.error(f"layer_types {str(types)[:40]!a} must be a list")
    if unknown := [kind for kind in types if kind not in known]:
        raise fields.error(f"layer_types: {unknown[0]!r} is not supported ({', '.join(known)})")
    if len(types) != len(default):
        raise fields.error(f"layer_types names {len(types)} layers, num_hidden_layers is {len(default)}")
    return tuple(types)


def _softcap(fields: Fields) -> float | None:
    softcap = fields.config.get("final_logit_softcapping")
    if softcap is not None and not positive(softcap):
        raise fields.error(f"final_logit_softcapping {softcap!r} must be above 0, or null for none")
    return softcap
