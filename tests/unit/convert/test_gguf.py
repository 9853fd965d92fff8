"""A GGUF file becomes a Hugging Face folder with the same logits and ids; what is not known is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_troll.cli.main import main
from megatron_troll.convert.gguf.metadata import GGUFFile, config_of
from megatron_troll.convert.gguf.tokenizer import tokenizer_of
from megatron_troll.mcore.rotary import inverse_frequencies
from megatron_troll.mcore.shape import read_shape
from megatron_troll.weights.source import open_source

TOKENS = ["<s>", "<|end|>", *"abcdefgh01Ġ", "ab", "Ġa"]
KINDS = [3, 3, *[1] * (len(TOKENS) - 2)]
MERGES = ["a b", "Ġ a"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": len(TOKENS),
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 16384,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "rope_parameters": LINEAR},
    "qwen3moe": {"model_type": "qwen3_moe", "tie_word_embeddings": True, **EXPERTS},
    # Without RoPE in every fourth layer.
    "smollm3": {
        "model_type": "smollm3",
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "pad_token_id": None,
    },
}
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZES | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    return model


def tensors_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """The tensors of a GGUF file, by llama.cpp's names."""
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), model.config.num_hidden_layers)
    found = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("experts.gate_up_proj"):
            layer = key.split(".")[2]
            gate, up = tensor.chunk(2, 1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif key.endswith("experts.down_proj"):
            found[f"blk.{key.split('.')[2]}.ffn_down_exps.weight"] = tensor
        elif key != "lm_head.weight" or not model.config.tie_word_embeddings:
            theirs = known.get_name(key, (".weight", ".bias"))
            assert theirs is not None, key
            found[theirs] = interleaved(key, tensor, name)
    return found


def interleaved(key: str, tensor: Tensor, name: str) -> Tensor:
    """Rows of a query or key, so that those which rotate together, d and d + 4 of 8, are neighbours."""
    if name not in ("llama", "smollm3") or not key.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    rows = [head * 8 + d for head in range(len(tensor) // 8) for d in (0, 4, 1, 5, 2, 6, 3, 7)]
    return tensor[rows]


def write(
    path: Path, name: str, *, more: dict[str, Any] | None = None, leave_out: str = ""
) -> PreTrainedModel:
    """Write a tiny model as GGUF; `more`: other metadata, by key."""
    model = model_of(name)
    writer = gguf.GGUFWriter(path, name)
    config = SIZES | MODELS[name]
    for key, ours in KEYS.items():
        if ours in config:
            writer.add_uint32(f"{name}.{key}", config[ours])
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{name}.rope.freq_base", config["rope_parameters"]["rope_theta"])
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", **scaling(name, config)}
    for key, value in (metadata | (more or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", KINDS)
    writer.add_array("tokenizer.ggml.merges", MERGES)
    if "tokenizer.ggml.eos_token_id" not in metadata | (more or {}):
        writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    tensors = tensors_of(model, name)
    if config["rope_parameters"]["rope_type"] == "llama3":
        unscaled = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
        tensors["rope_freqs.weight"] = unscaled / model.model.rotary_emb.inv_freq
    for key, tensor in tensors.items():
        if key != leave_out:
            # Matrices have no better form in these files than fp32, which is kept bit by bit.
            writer.add_tensor(key, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def scaling(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The metadata of linear and YaRN's RoPE."""
    rope = config["rope_parameters"]
    found = {}
    if rope["rope_type"] in ("linear", "yarn"):
        found = {
            f"{name}.rope.scaling.type": rope["rope_type"],
            f"{name}.rope.scaling.factor": rope["factor"],
        }
    if rope["rope_type"] == "yarn":
        original = f"{name}.rope.scaling.original_context_length"
        found[original] = rope["original_max_position_embeddings"]
    return found


def convert(file: Path, target: Path, *options: str) -> int:
    return main(["convert", "gguf2hf", str(file), str(target), *options])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = write(tmp_path / "model.gguf", name)
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 1
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_biases_of_qwen2_are_numbers_of_the_file(tmp_path: Path) -> None:
    model = write(tmp_path / "model.gguf", "qwen2")
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 0
    bias = model.state_dict()["model.layers.1.self_attn.k_proj.bias"]
    source = open_source(tmp_path / "hf", read_shape(tmp_path / "hf"))
    assert float(bias.abs().min()) > 0
    assert torch.equal(source.read("model.layers.1.self_attn.k_proj.bias"), bias)


@pytest.mark.parametrize(
    ("name", "rope"), [("llama", LLAMA3), ("qwen2", YARN), ("qwen3", LINEAR), ("smollm3", None)]
)
def test_rope_is_that_of_the_model(tmp_path: Path, name: str, rope: dict[str, Any] | None) -> None:
    write(tmp_path / "model.gguf", name)
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == (rope or {"rope_type": "default", "rope_theta": 10000.0})
    read, meant = AutoConfig.from_pretrained(tmp_path / "hf"), AutoConfig.for_model(**SIZES | MODELS[name])
    if name == "smollm3":
        assert read.no_rope_layers == meant.no_rope_layers == [1, 1, 1, 0]
    # What training computes with, beside Hugging Face's model of the config that the file was made from.
    theirs = model_of(name).model.rotary_emb
    ours = inverse_frequencies(read_shape(tmp_path / "hf"))
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)


def test_a_folder_that_holds_something_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.gguf", "qwen3")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine").write_text("x")
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 2
    assert f"{tmp_path / 'hf'} is not empty: convert to another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine"]
    (tmp_path / "hf" / "mine").unlink()
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 0
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 2


def test_words_are_cut_before_they_are_merged(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "qwen3")
    tokenizer = tokenizer_of(GGUFFile(tmp_path / "model.gguf"))
    # A digit stands alone, a blank goes with the word after it, and ab is merged, but not across words.
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab01 a<|end|>b")["input_ids"]) == [
        *("ab", "0", "1", "Ġa", "<|end|>", "b")
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("qwen3", {"more": {"qwen3.attention.sliding_window": 8}}, "attention.sliding_window = 8 is not"),
        ("qwen3", {"more": {"tokenizer.ggml.pre": "tekken"}}, "tokenizer.ggml.pre 'tekken' is not known"),
        ("qwen3", {"more": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.model 'llama' is not"),
        ("qwen3", {"more": {"qwen3.rope.scaling.type": "longrope"}}, "rope.scaling.type 'longrope' is not"),
        ("qwen3", {"leave_out": "blk.1.attn_q.weight"}, "blk.1.attn_q.weight (model.layers.1.self_attn.q_"),
        ("qwen3", {"more": {"tokenizer.ggml.eos_token_id": 99}}, "token 99 (eos) is beyond the 15 tokens"),
        ("qwen3", {"more": {"tokenizer.ggml.padding_token_id": 15}}, "token 15 (pad) is beyond the 15"),
        ("qwen2", {"leave_out": "blk.1.attn_k.bias"}, "blk.1.attn_k.bias (model.layers.1.self_attn.k_"),
        ("qwen2", {"more": {"qwen2.rope.scaling.attn_factor": 1.2}}, "rope.scaling.attn_factor = 1.2"),
        ("qwen3", {"more": {"qwen3.rope.dimension_count": 4}}, "rope.dimension_count 4 is not the size of"),
    ],
)
def test_what_is_not_known_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, options: dict[str, Any], said: str
) -> None:
    write(tmp_path / "model.gguf", name, **options)
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_file_that_is_cut_off_or_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "model.gguf", "qwen3")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert convert(tmp_path / "cut.gguf", tmp_path / "hf") == 2
        assert "is not a whole GGUF file" in capsys.readouterr().err
    assert convert(tmp_path / "model.gguf", tmp_path / "hf", "--sha256", "0" * 64) == 2
    assert "its SHA-256 is" in capsys.readouterr().err
    assert convert(tmp_path / "none.gguf", tmp_path / "hf") == 2
    assert "none.gguf" in capsys.readouterr().err


def test_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert convert(tmp_path / "model.gguf", tmp_path / "hf") == 2
    assert "general.architecture 'gemma3' is not supported (llama, " in capsys.readouterr().err


def test_float32_numbers_are_read_as_they_were_meant(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "qwen3")
    config = config_of(GGUFFile(tmp_path / "model.gguf"))
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 10000.0)
