"""Tokenizers of GGUF files give the ids of llama.cpp, recorded by tools/record_pre_tokenizers.py."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_troll.config import ConfigError
from megatron_troll.convert.gguf.metadata import GGUFFile
from megatron_troll.convert.gguf.tokenizer import COMPOSED, PRE_TOKENIZERS, tokenizer_of

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded/pre_tokenizers.json").read_text())
TOKENS: list[str] = RECORDED["tokens"]


def opened(path: Path, pre: str, **ids: int) -> GGUFFile:
    """A file with the recorded vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", 512)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    kinds = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_array("tokenizer.ggml.token_type", [int(kind) for kind in kinds])
    writer.add_array("tokenizer.ggml.merges", RECORDED["merges"])
    for role, number in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
    if "bos" in ids:
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.fixture(params=PRE_TOKENIZERS)
def pre(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(tmp_path: Path, pre: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(opened(tmp_path / "model.gguf", pre))


def test_the_ids_are_llama_cpps(pre: str, tokenizer: PreTrainedTokenizerFast) -> None:
    column = RECORDED["columns"].index(pre)
    wrong = [
        (text, tokenizer.convert_ids_to_tokens(found), tokenizer.convert_ids_to_tokens(row[column]))
        for text, *row in RECORDED["cases"]
        if (found := tokenizer.encode(text, add_special_tokens=False)) != row[column]
    ]
    assert wrong == []


def test_the_ids_give_the_texts_back(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for text, *_ in RECORDED["cases"]]
    assert [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts] == texts


def test_only_qwens_compose_characters(pre: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """As their published tokenizers do, and llama.cpp does not."""
    apart, composed = (tokenizer.encode(text, add_special_tokens=False) for text in ("e\u0301", "\u00e9"))
    assert (apart == composed) == (pre in COMPOSED)


def test_the_records_tell_the_pre_tokenizers_apart() -> None:
    """All but the one that DeepSeek took over from Qwen."""
    columns = dict(zip(RECORDED["columns"], zip(*(row for _, *row in RECORDED["cases"]))))
    assert set(columns) == set(PRE_TOKENIZERS)
    assert columns.pop("deepseek-r1-qwen") == columns["qwen2"]
    assert len({json.dumps(column) for column in columns.values()}) == len(columns)


@pytest.mark.parametrize("role", ["bos", "eos", "padding", "unknown"])
def test_ids_beyond_the_tokens_are_refused_by_role(tmp_path: Path, role: str) -> None:
    file = opened(tmp_path / "model.gguf", "qwen2", **{role: len(TOKENS)})
    with pytest.raises(ConfigError, match=rf"token {len(TOKENS)} \(\w+\) is beyond the {len(TOKENS)} tokens"):
        tokenizer_of(file)


def test_a_first_token_is_put_in_front_where_the_file_asks_for_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(opened(tmp_path / "model.gguf", "llama-bpe", bos=len(TOKENS) - 1))
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == len(TOKENS) - 1
    assert len(tokenizer.encode("a")) == 2
