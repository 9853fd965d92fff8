"""The tokens that end a response. In the demo's tokenizer <|end|> is 4, in a vocabulary of 53."""

import json
import shutil

import pytest

from megatron_troll.data.chat import encode_chat
from megatron_troll.data.rows import DataError
from megatron_troll.data.stops import stop_tokens
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message

VOCAB = 53


@pytest.fixture
def folder(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "base")


def declare(folder, eos, name="generation_config.json") -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": eos}))


def as_base_model(folder, tokenizer) -> ChatTemplate:
    """The folder as Base models are published: the end of sequence is no token of the chat template."""
    tokenizer.eos_token = "<pad>"
    declare(folder, 0)
    declare(folder, 0, "config.json")
    return ChatTemplate(tokenizer)


def test_the_end_of_sequence_stops_a_response(base_folder, tokenizer):
    stops = stop_tokens(ChatTemplate(tokenizer), base_folder, VOCAB)
    assert (stops.ids, stops.exported, stops.remark) == ((4,), (4,), "")


def test_stop_texts_and_both_configs_join_it(folder, tokenizer):
    declare(folder, [4, 2])
    declare(folder, 3, "config.json")
    stops = stop_tokens(ChatTemplate(tokenizer), folder, VOCAB, ("<pad>",))
    assert (stops.ids, stops.exported) == ((0, 2, 3, 4), (2, 3, 4))


def test_an_end_of_sequence_may_stand_beside_the_sizes_of_the_text(folder, tokenizer):
    """As in Qwen3.5, whose config has a vision tower too."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "qwen3_5", "text_config": config | {"eos_token_id": 2}}))
    assert stop_tokens(ChatTemplate(tokenizer), folder, VOCAB).exported == (2, 4)
    path.write_text(json.dumps({"text_config": {"eos_token_id": VOCAB}}))
    with pytest.raises(DataError, match=f"config.json: eos_token_id: no model of {VOCAB} tokens can sample"):
        stop_tokens(ChatTemplate(tokenizer), folder, VOCAB)


def test_the_token_that_a_warm_start_teaches_is_a_stop_token(folder, tokenizer):
    template = as_base_model(folder, tokenizer)
    ids, mask = encode_chat([Message("user", "sort 21"), Message("assistant", "12", train=True)], template)
    stops = stop_tokens(template, folder, VOCAB)
    assert ids[mask > 0][-1] in stops.ids
    assert stops.exported == (0, 4)
    assert stops.remark == (
        f"the chat template ends a turn with '<|end|>', {folder} ends a sequence with '<pad>': "
        "sampling stops at either, and an export names both"
    )


def test_a_stop_text_of_several_tokens_is_refused(folder, tokenizer):
    with pytest.raises(DataError, match=r"'ab' is not one token of the tokenizer \(it encodes to \[15, 16\]"):
        stop_tokens(ChatTemplate(tokenizer), folder, VOCAB, ("ab",))


def test_a_stop_text_that_has_no_token_is_refused(folder, tokenizer):
    with pytest.raises(DataError, match=r"^eval\.a\.stop: the tokenizer has no token for 'B' \(U\+0042\)"):
        stop_tokens(ChatTemplate(tokenizer), folder, VOCAB, ("aB",), "eval.a.stop")


def test_a_model_that_could_never_stop_is_refused(folder, tokenizer):
    for name in ("generation_config.json", "config.json"):
        (folder / name).unlink()
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="nothing ends a response"):
        stop_tokens(ChatTemplate(tokenizer), folder, VOCAB)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("eos", "said"),
    [
        ([4, 99999], "no model of 53 tokens can sample 99999; expected 0 to 52"),
        (53, "no model of 53 tokens can sample 53"),
        ([4, -1], "no model of 53 tokens can sample -1"),
        (True, "must be an id or a list of ids, got True"),
        ([False], r"must be an id or a list of ids, got \[False\]"),
        (4.0, "must be an id or a list of ids, got 4.0"),
        ("</s>", "must be an id or a list of ids, got '</s>'"),
    ],
)
def test_an_id_that_no_model_can_sample_is_refused_by_file(folder, tokenizer, name, eos, said):
    declare(folder, eos, name)
    with pytest.raises(DataError, match=rf"/{name}: eos_token_id:? {said}"):
        stop_tokens(ChatTemplate(tokenizer), folder, VOCAB)


def test_a_broken_generation_config_is_named(folder, tokenizer):
    for broken in ("[", "[1]", "[" * 100_000):
        (folder / "generation_config.json").write_text(broken)
        with pytest.raises(DataError, match=r"generation_config\.json: cannot be read"):
            stop_tokens(ChatTemplate(tokenizer), folder, VOCAB)


def test_a_turn_that_no_special_token_ends_is_said(folder, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "a")
    template = ChatTemplate(tokenizer)
    remark = stop_tokens(template, folder, VOCAB).remark
    assert remark.startswith("WARNING: the chat template ends a turn with 'a', which is no special token")
    assert stop_tokens(template, folder, VOCAB, ("a",)).remark == ""


def test_an_ending_that_the_tokenizer_cannot_encode_is_no_end_of_turn(folder, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "\N{SNOWMAN}")
    template = ChatTemplate(tokenizer)
    assert (template.end_of_turn, stop_tokens(template, folder, VOCAB).remark) == (None, "")
