"""Caches of a server, against those that Hugging Face's models fill, and who fits beside the weights."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_troll.launch.plan.models import PUBLISHED, shape_at
from megatron_troll.launch.plan.servers import servers_of, state_of_sequence, values_of_token
from megatron_troll.mcore.shape import shape_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
TOKENS = 12


def small(name: str) -> dict[str, Any]:
    return json.loads((PUBLISHED / name / "config.json").read_text()) | SMALL


@torch.no_grad()
def filled(sizes: dict[str, Any]) -> list[Any]:
    """The cache of each layer after TOKENS tokens of one sequence."""
    config = AutoConfig.for_model(**{key: value for key, value in sizes.items() if key != "torch_dtype"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model(torch.arange(TOKENS)[None], use_cache=True).past_key_values.layers


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B-Instruct"])
def test_keys_and_values_of_a_token(name: str) -> None:
    shape = shape_of(small(name))
    layers = [
        layer for layer, kind in zip(filled(small(name)), shape.layer_types) if kind == "full_attention"
    ]
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert values_of_token(shape, shape.layer_types, tp=1) * TOKENS == numbers
    assert values_of_token(shape, shape.layer_types, tp=2) * TOKENS == numbers / 2


def test_the_state_of_a_sequence_does_not_grow() -> None:
    sizes = small("Qwen3-Next-80B-A3B-Instruct")
    shape = shape_of(sizes)
    layers = [layer for layer, kind in zip(filled(sizes), shape.layer_types) if kind == "linear_attention"]
    matrices = sum(state.nbytes for layer in layers for state in layer.recurrent_states.values())
    # Hugging Face keeps one more input of the convolution than must be seen again.
    seen = sum(state.nbytes * 3 // 4 for layer in layers for state in layer.conv_states.values())
    assert state_of_sequence(shape, shape.layer_types, tp=1, width=4) == matrices + seen


def test_more_heads_than_gpus_are_cut_and_fewer_are_copied() -> None:
    shape = shape_at("path", "Qwen3-30B-A3B")
    per_gpu = {server.tp: server.token_bf16 for server in servers_of(shape, 30 * 10**9, 16384, 120 * 2**30)}
    assert per_gpu == {1: 98304, 2: 49152, 4: 24576, 8: 24576}


def test_an_fp8_cache_holds_twice_the_sequences() -> None:
    shape = shape_at("path", "Qwen3-30B-A3B")
    weights, room = 2 * 30 * 10**9, 10 * 98304 * 1000
    one, *_ = servers_of(shape, 30 * 10**9, 1000, weights + room)
    assert (one.tp, one.weights, one.sequences_bf16, one.sequences_fp8) == (1, weights, 10, 20)


def test_no_server_where_the_weights_do_not_fit() -> None:
    shape = shape_at("path", "Qwen3-30B-A3B")
    assert [server.tp for server in servers_of(shape, 30 * 10**9, 1000, 20 * 2**30)] == [4, 8]
