import json
import shutil

import pytest

from megatron_troll.data.rows import DataError
from megatron_troll.data.tokenizer import check_reasoning_tags, check_vocab, load_tokenizer, stop_ids


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


def test_the_end_of_sequence_stops_a_response(base_folder, tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(stop_ids(tokenizer, base_folder))) == ["<|end|>"]


def test_stop_texts_and_the_generation_config_join_it(folder, tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2]}))
    assert stop_ids(tokenizer, folder, ("<pad>",)) == (0, 2, 4)


def test_a_stop_text_of_several_tokens_is_refused(folder, tokenizer):
    with pytest.raises(DataError, match=r"'ab' is not one token of the tokenizer \(it encodes to \[15, 16\]"):
        stop_ids(tokenizer, folder, ("ab",))


def test_a_model_that_could_never_stop_is_refused(folder, tokenizer):
    (folder / "generation_config.json").unlink()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="nothing ends a response"):
        stop_ids(tokenizer, folder)


def test_a_broken_generation_config_is_named(folder, tokenizer):
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(DataError, match=r"generation_config\.json: cannot be read"):
        stop_ids(tokenizer, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(DataError, match="must be an id or a list of ids, got '</s>'"):
        stop_ids(tokenizer, folder)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    check_vocab(tokenizer, 53)
    with pytest.raises(DataError, match=r"gives '\)' the id 52, but the model's vocab_size is 52"):
        check_vocab(tokenizer, 52)


def test_folders_without_a_usable_tokenizer(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)
