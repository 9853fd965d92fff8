"""The untrained models of the demo in Hugging Face format (a tiny Qwen3-MoE, a smaller one and a tiny
Qwen3-Next) and their tokenizer."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

PAD, END = "<pad>", "<|end|>"
SPECIAL = [PAD, "<|system|>", "<|user|>", "<|assistant|>", END]
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=?:,.()"
VOCAB_SIZE = 64
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_base(folder: Path) -> None:
    """Write the Qwen3-MoE."""
    _write(folder, model_config())


def write_hybrid(folder: Path) -> None:
    """Write the Qwen3-Next."""
    _write(folder, hybrid_config())


def write_small(folder: Path) -> None:
    """Write a Qwen3-MoE with a tenth of the parameters, to sample rollouts for the other."""
    _write(folder, small_config())


def _write(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json, generation_config.json and the tokenizer; a random start needs no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    character_tokenizer().save_pretrained(folder)
    _write_json(folder / "config.json", config)
    ends = {"eos_token_id": SPECIAL.index(END), "pad_token_id": SPECIAL.index(PAD)}
    _write_json(folder / "generation_config.json", ends)


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """A tokenizer of 5 tokens and the characters: roles, padding, end. A turn is role, text and <|end|>."""
    vocab = {token: index for index, token in enumerate(SPECIAL + list(characters))}
    tokenizer = Tokenizer(WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def model_config() -> dict[str, Any]:
    """The fields of a published Qwen3-MoE config.json; 453k parameters. VOCAB_SIZE is padded beyond the
    tokenizer, as in published models."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "eos_token_id": SPECIAL.index(END),
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.05,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "pad_token_id": SPECIAL.index(PAD),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def small_config() -> dict[str, Any]:
    """Like `model_config`, with 41k parameters in two layers."""
    return model_config() | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_hidden_layers": 2,
    }


def hybrid_config() -> dict[str, Any]:
    """Like `model_config`, for Qwen3-Next: three layers of linear attention, one of full attention."""
    return model_config() | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 64,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
