import json
import shutil

import pytest

from megatron_troll.data.rows import DataError
from megatron_troll.data.tokenizer import check_reasoning_tags, check_vocab, load_tokenizer


@pytest.fixture
def folder(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def test_a_tag_that_texts_lack_cannot_end_reasoning(tokenizer):
    check_reasoning_tags(tokenizer)
    tokenizer.add_tokens(["</think>"])
    check_reasoning_tags(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    with pytest.raises(DataError, match=r"</think> out of texts.* or set reward\.reasoning=keep"):
        check_reasoning_tags(tokenizer)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    check_vocab(tokenizer, 53)
    with pytest.raises(DataError, match=r"beyond the model's vocab_size 52: '\)' \(52\): token"):
        check_vocab(tokenizer, 52)


def test_added_tokens_without_a_row_of_the_embedding_are_named(tokenizer):
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<c>", "<d>"]})
    check_vocab(tokenizer, 57)
    with pytest.raises(DataError, match=r"base: .*size 53: '<a>' \(53\), '<b>' .* and 1 more: "):
        check_vocab(tokenizer, 53)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "smollm3", "apertus", "qwen3_5", "qwen3_5_moe_text"]
)
def test_the_family_does_not_change_the_tokenizer(folder, tokenizer, family):
    """transformers would take Qwen2.5's rules for splitting text in a folder with a Qwen2.5 model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": family}))
    text = "sort 31 42"
    ids = load_tokenizer(folder).encode(text)
    assert ids == tokenizer.encode(text)
    assert load_tokenizer(folder).decode(ids) == text


def test_folders_without_a_usable_tokenizer(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    (folder / "chat_template.jinja").unlink()
    wanted = r"no chat template, neither in chat_template\.jinja nor in tokenizer_config.json: write one to /"
    with pytest.raises(DataError, match=wanted):
        load_tokenizer(folder)
    (folder / "chat_template.json").unlink(missing_ok=True)
    for broken in (
        "{",
        "{}",
        "[]",
        '{"model": {}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": 1}}',
    ):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
            load_tokenizer(folder)
