"""Chats as tokens. In these pictures U, A and E are <|user|>, <|assistant|> and <|end|>."""

import numpy as np
import pytest

from megatron_troll.data.chat import encode_chat, tokenized
from megatron_troll.data.rows import DataError
from megatron_troll.types import Message, Prompt

USER = Message("user", "sort 21")
ANSWER = Message("assistant", "12", train=True)
QWEN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompt_of(*messages: Message) -> Prompt:
    return Prompt("p", messages, "")


def picture(ids, tokenizer) -> str:
    names = {"<|user|>": "U", "<|assistant|>": "A", "<|end|>": "E"}
    return "".join(names.get(token, token) for token in tokenizer.convert_ids_to_tokens(list(ids)))


def marks(mask) -> str:
    return "".join("^" if value else "." for value in mask)


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    first, second = tokenized([prompt_of(USER), prompt_of(USER, ANSWER, USER)], tokenizer)
    assert picture(first.ids.tolist(), tokenizer) == "Usort 21EA"
    assert picture(second.ids.tolist(), tokenizer) == "Usort 21EA12EUsort 21EA"
    assert first.ids.dtype == np.int32


def test_a_prompt_that_opens_reasoning(tokenizer):
    """Templates of thinking models write <think> before the answer."""
    tokenizer.add_tokens(["<think>", "</think>"])
    for ending, opens in (("<think> ", True), ("", False), ("<think></think>", False)):
        tokenizer.chat_template = QWEN + ending
        (prompt,) = tokenized([prompt_of(Message("user", "sort <think>"))], tokenizer)
        assert prompt.opens_reasoning == opens


def test_content_and_end_of_turn_carry_loss(tokenizer):
    ids, mask = encode_chat([USER, ANSWER], tokenizer)
    assert picture(ids, tokenizer) == "Usort 21EA12E"
    assert marks(mask) == "..........^^^"
    assert (ids.dtype, mask.dtype) == (np.int64, np.float32)


def test_only_marked_turns_of_a_long_chat_carry_loss(tokenizer):
    chat = [USER, Message("assistant", "21"), Message("user", "no"), ANSWER]
    ids, mask = encode_chat(chat, tokenizer)
    assert picture(ids, tokenizer) == "Usort 21EA21EUnoEA12E"
    assert marks(mask) == "................. ^^^".replace(" ", ".")


def test_what_the_template_writes_after_the_end_of_turn_carries_no_loss(tokenizer):
    tokenizer.chat_template = QWEN
    ids, mask = encode_chat([USER, ANSWER], tokenizer)
    assert picture(ids, tokenizer) == "Usort 21E A12E "
    assert marks(mask) == "...........^^^."


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encode_chat([USER, ANSWER], tokenizer)
    with pytest.raises(DataError, match=r"not prefix-stable: the chat through turn 2 \('12'\)"):
        encode_chat([USER, ANSWER, USER, ANSWER], tokenizer)


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_refused(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|assistant|>' }}", "{{ '<|assistant|>:' }}"
    )
    with pytest.raises(DataError, match="not prefix-stable: the chat before turn 2"):
        encode_chat([USER, ANSWER], tokenizer)


def test_a_template_without_an_end_of_turn_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="ends turn 2 with no special token"):
        encode_chat([USER, ANSWER], tokenizer)


def test_only_an_answer_may_carry_loss(tokenizer):
    with pytest.raises(DataError, match="turn 1 carries loss"):
        encode_chat([Message("user", "a", train=True)], tokenizer)


def test_a_template_may_refuse_a_chat(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match=r"^prompt 'p': .* refuses a chat of the roles user: no system turns"):
        tokenized([prompt_of(USER)], tokenizer)


def test_of_many_prompts_the_one_that_is_refused_is_named(tokenizer):
    """The rest of its template renders the others."""
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    chats = [prompt_of(USER), prompt_of(Message("system", "be brief"), USER)]
    with pytest.raises(DataError, match=r"^line 2: .* of the roles system, user: no system turns"):
        tokenized(chats, tokenizer, ["line 1", "line 2"])


def test_many_prompts_have_the_ids_that_each_has_alone(tokenizer):
    """Also with a tokenizer that is set to truncate and to pad."""
    chats = [prompt_of(Message("user", "sort " + "1234567890"[:n])) for n in range(1, 9)]
    alone = [tokenized([chat], tokenizer)[0].ids.tolist() for chat in chats]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert [prompt.ids.tolist() for prompt in tokenized(chats, tokenizer)] == alone
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": chat.messages[0].content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for chat in chats
    ]
    assert alone == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
