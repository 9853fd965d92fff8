"""A tiny Qwen3, Qwen3-MoE and Qwen3-Next: Hugging Face configs, and models with weights worth testing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_troll.config import Layout
from megatron_troll.mcore.parallel import leave, start
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import Groups
from megatron_troll.types import SHARES, MicroBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# No two sizes that a mistake could confuse are equal, and an odd vocabulary pads under TP2.
DENSE = {
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
# Two layers of each kind, so that a pipeline of two stages has both kinds on each.
NEXT = MOE | {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "shared_expert_intermediate_size": 56,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    "linear_conv_kernel_dim": 4,
}


STEEP = ("embed", "mlp.gate.weight", "conv1d")


def reference(config: dict[str, Any], seed: int = 0) -> "PreTrainedModel":
    """The Hugging Face model in fp32 with eager attention. No weight is trivial: norms differ from one, and
    the router is steep enough that rounding does not change the chosen experts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    model = kind.from_config(
        AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    zero_centred = shape_of(config).zero_centred_norms
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                centre = 0 if zero_centred and not name.endswith("linear_attn.norm.weight") else 1
                parameter.copy_(centre + 0.1 * drawn)
            elif name.endswith(("A_log", "dt_bias")):
                parameter.copy_(drawn - 2)  # states that outlast a sequence, were they not cut
            else:
                parameter.copy_((0.5 if any(part in name for part in STEEP) else 0.1) * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith(("act_fn.beta", "act_fn.eps")):
                centre = 0.5 if name.endswith("beta") else -0.2
                buffer.copy_(centre + 0.1 * torch.rand(buffer.shape, generator=generator))
    return model


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[b, s, V], with the soft-cap of `final_logit_softcapping`, which Hugging Face's Qwen3 has not."""
    logits, cap = model(ids).logits, getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def write_reference(config: dict[str, Any], folder: Path, seed: int = 0) -> "PreTrainedModel":
    """Save `reference` in the published format and return it."""
    model = reference(config, seed)
    model.save_pretrained(folder)
    return model


def unpacked(tokens: Tensor, positions: Tensor, length: int, index: Tensor, target: Tensor) -> MicroBatch:
    """A micro-batch of rows [b, s] of sequences of `length`, at `positions` [s], that is read at `index` [N]
    of the flattened rows. Every weight is 1."""
    rows, ones = tuple(range(len(tokens))), torch.ones(len(index))
    return MicroBatch(
        tokens=tokens,
        positions=positions.expand_as(tokens),
        padding=torch.zeros_like(tokens, dtype=torch.bool),
        share=torch.full_like(tokens, SHARES, dtype=torch.int32),
        cu_seqlens=None,
        max_seqlen=length,
        tree=None,
        index=index,
        target=target,
        sequence=index // tokens.shape[1],
        position=positions.expand_as(tokens).reshape(-1)[index],
        weight=ones,
        advantage=ones,
        response_advantage=None,
        rollout_logp=ones,
        rollout_topk=None,
        uniform=ones,
        rollouts=rows,
        groups=rows,
        batch_size=len(rows),
        apart=tokens.numel(),
    )


@contextmanager
def started(layout: Layout, seed: int = 1) -> Iterator[Groups]:
    """The groups of `layout` on ranks that a pool keeps; they end with the block."""
    groups = start(layout, seed)
    try:
        yield groups
    finally:
        leave()
