"""Qwen3, dense and with experts."""

from megatron_troll.mcore.shape.common import decoder, divided_head_dim
from megatron_troll.mcore.shape.experts import with_experts
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape

HEAD_DIM = 128


def read(fields: Fields) -> ModelShape:
    check(fields)
    return decoder(fields, fields.size("head_dim", HEAD_DIM))


def read_moe(fields: Fields) -> ModelShape:
    check(fields)
    # transformers 5 writes `num_local_experts`.
    key = "num_experts" if "num_experts" in fields.config else "num_local_experts"
    return with_experts(fields, decoder(fields, divided_head_dim(fields)), fields.size(key), norm_topk=False)


def check(fields: Fields) -> None:
    """Refuse what no Qwen3 model here has."""
    for key in ("use_sliding_window", "attention_bias"):
        fields.only(key, False, None)
    fields.only("hidden_act", "silu")
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [], None)
