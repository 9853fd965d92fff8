"""Chats as tokens. In these pictures U, A and E are <|user|>, <|assistant|> and <|end|>."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_troll.data.chat import encode_chat, encoded, tokenized
from megatron_troll.data.rows import DataError, Malformed
from megatron_troll.data.template import ChatTemplate
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
    first, second = tokenized([prompt_of(USER), prompt_of(USER, ANSWER, USER)], ChatTemplate(tokenizer))
    assert picture(first.ids.tolist(), tokenizer) == "Usort 21EA"
    assert picture(second.ids.tolist(), tokenizer) == "Usort 21EA12EUsort 21EA"
    assert first.ids.dtype == np.int32


def test_a_prompt_that_opens_reasoning(tokenizer):
    """Templates of thinking models write <think> before the answer."""
    tokenizer.add_tokens(["<think>", "</think>"])
    for ending, opens in (("<think> ", True), ("", False), ("<think></think>", False)):
        tokenizer.chat_template = QWEN + ending
        (prompt,) = tokenized([prompt_of(Message("user", "sort <think>"))], ChatTemplate(tokenizer))
        assert prompt.opens_reasoning == opens


def test_content_and_end_of_turn_carry_loss(tokenizer):
    ids, mask = encode_chat([USER, ANSWER], ChatTemplate(tokenizer))
    assert picture(ids, tokenizer) == "Usort 21EA12E"
    assert marks(mask) == "..........^^^"
    assert (ids.dtype, mask.dtype) == (np.int64, np.float32)


def test_only_marked_turns_of_a_long_chat_carry_loss(tokenizer):
    chat = [USER, Message("assistant", "21"), Message("user", "no"), ANSWER]
    ids, mask = encode_chat(chat, ChatTemplate(tokenizer))
    assert picture(ids, tokenizer) == "Usort 21EA21EUnoEA12E"
    assert marks(mask) == "................. ^^^".replace(" ", ".")


def test_what_the_template_writes_after_the_end_of_turn_carries_no_loss(tokenizer):
    tokenizer.chat_template = QWEN
    ids, mask = encode_chat([USER, ANSWER], ChatTemplate(tokenizer))
    assert picture(ids, tokenizer) == "Usort 21E A12E "
    assert marks(mask) == "...........^^^."


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encode_chat([USER, ANSWER], ChatTemplate(tokenizer))
    with pytest.raises(Malformed, match=r"writes turn 2 \('12'\) differently when more follows"):
        encode_chat([USER, ANSWER, USER, ANSWER], ChatTemplate(tokenizer))


def test_a_generation_prompt_that_the_answer_does_not_repeat_is_refused(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|assistant|>' }}", "{{ '<|assistant|>:' }}"
    )
    with pytest.raises(Malformed, match=r"not write turn 2 as an answer .* '12<\|end\|>' in place of ':'"):
        encode_chat([USER, ANSWER], ChatTemplate(tokenizer))


def test_a_template_without_an_end_of_turn_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(Malformed, match="ends an assistant's turn with no special token"):
        encode_chat([USER, ANSWER], ChatTemplate(tokenizer))


def test_only_an_answer_may_carry_loss(tokenizer):
    with pytest.raises(Malformed, match="turn 1 carries loss"):
        encode_chat([Message("user", "a", train=True)], ChatTemplate(tokenizer))


def test_a_template_may_refuse_a_chat(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(DataError, match=r"^prompt 'p': .* refuses a chat of the roles user: no system turns"):
        tokenized([prompt_of(USER)], ChatTemplate(tokenizer))


def of_chats(chats, tokenizer):
    """The ids of each chat, or why it has none."""
    prompts = [Prompt(str(i), chat, "") for i, chat in enumerate(chats)]
    found = encoded(prompts, ChatTemplate(tokenizer))
    return [one.ids if isinstance(one, Prompt) else one for one in found]


def test_of_many_prompts_only_those_that_are_refused_have_no_ids(tokenizer):
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + tokenizer.chat_template
    )
    chats = [(USER,), (Message("system", "be brief"), USER), (Message("user", "sort \u00e9"),), (USER,)]
    first, refused, unknown, last = of_chats(chats, tokenizer)
    assert str(refused) == "the chat template refuses a chat of the roles system, user: no system turns"
    assert str(unknown) == "the tokenizer has no token for 'é' (U+00E9)"
    assert picture(first, tokenizer) == picture(last, tokenizer) == "Usort 21EA"


def test_a_role_that_the_template_leaves_out_is_refused(tokenizer):
    """Qwen3's template, for one, writes nothing of a turn of a role that it does not know."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|' + message", "{% if message.role in ('user', 'assistant') %}{{ '<|' + message"
    ).replace("'<|end|>' }}{% endfor", "'<|end|>' }}{% endif %}{% endfor")
    found = of_chats([(USER,), (USER, Message("critic", "no"), USER)], tokenizer)
    assert picture(found[0], tokenizer) == "Usort 21EA"
    assert str(found[1]) == "turn 2: the chat template leaves out a turn of the role 'critic'"
    with pytest.raises(Malformed, match="leaves out a turn of the role 'developer'"):
        encode_chat([Message("developer", "be brief"), USER, ANSWER], ChatTemplate(tokenizer))


def test_many_prompts_have_the_ids_that_each_has_alone(tokenizer):
    """Also with a tokenizer that is set to truncate and to pad."""
    chats = [prompt_of(Message("user", "sort " + "1234567890"[:n])) for n in range(1, 9)]
    alone = [tokenized([chat], ChatTemplate(tokenizer))[0].ids.tolist() for chat in chats]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    assert [prompt.ids.tolist() for prompt in tokenized(chats, ChatTemplate(tokenizer))] == alone
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": chat.messages[0].content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for chat in chats
    ]
    assert alone == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


LINES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def joining(tokenizer):
    """A tokenizer that joins line breaks: two in a row are one token, as in Qwen's vocabulary."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["model"]["vocab"] |= {"\n": 53, "\n\n": 54, "<think>": 55, "</think>": 56}
    told["pre_tokenizer"]["pattern"] = {"Regex": r"<think>|</think>|\n+|[\s\S]"}
    backend = Tokenizer.from_str(json.dumps(told))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=LINES)


def taught(messages, template: ChatTemplate) -> tuple[list[str], list[str]]:
    """The tokens of a demonstration without loss, and those with."""
    ids, mask = encode_chat(messages, template)
    name = template.tokenizer.convert_ids_to_tokens
    return name(ids[mask == 0].tolist()), name(ids[mask > 0].tolist())


@pytest.mark.parametrize("answer", ["13", "\n13", "\n\n13", ""])
def test_a_demonstration_has_the_ids_that_sampling_would_give_it(joining, answer):
    """Joined with the line break of the prompt, that of the answer would be another token."""
    template = ChatTemplate(joining)
    (prompt,) = tokenized([prompt_of(USER)], template)
    ids, mask = encode_chat([USER, Message("assistant", answer, train=True)], template)
    sampled = [*prompt.ids, *template.encode(answer), template.end_of_turn]
    assert ids[: len(sampled)].tolist() == sampled
    assert mask.tolist() == [0.0] * len(prompt.ids) + [1.0] * (len(sampled) - len(prompt.ids)) + [0.0]


def test_every_trained_turn_of_a_chat_begins_where_sampling_begins(joining):
    chat = [USER, Message("assistant", "\n21", train=True), USER, Message("assistant", "\n12", train=True)]
    _, answers = taught(chat, ChatTemplate(joining))
    assert answers == ["\n", "2", "1", "<|end|>", "\n", "1", "2", "<|end|>"]


# Qwen3-Thinking writes empty reasoning into an answer that has none; DeepSeek-R1 writes no reasoning at all.
OPENS = "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
QWEN_THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}" + OPENS
)
DEEPSEEK = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}<|end|>\n{% endfor %}"
    + OPENS
)


def test_a_template_that_opens_reasoning_takes_an_answer_without_any(joining):
    joining.chat_template = QWEN_THINKING
    _, answer = taught([USER, Message("assistant", "13", train=True)], ChatTemplate(joining))
    assert answer == ["\n", "</think>", "\n\n", "1", "3", "<|end|>"]


@pytest.mark.parametrize("template", [QWEN_THINKING, DEEPSEEK])
def test_reasoning_is_taught_as_it_is_sampled(joining, template):
    joining.chat_template = template
    reasoned = Message("assistant", "<think>\nab</think>13", train=True)
    prompt, answer = taught([USER, reasoned], ChatTemplate(joining))
    assert prompt[-4:] == ["<|assistant|>", "\n", "<think>", "\n"] or prompt[-1:] == ["\n"]
    assert answer == ["a", "b", "</think>", "1", "3", "<|end|>"]


def test_reasoning_that_cannot_end_is_refused_for_that(joining):
    joining.chat_template = DEEPSEEK
    with pytest.raises(Malformed, match=r"turn 2 holds no reasoning, but the chat template opens <think>"):
        encode_chat([USER, ANSWER], ChatTemplate(joining))


def test_an_answer_that_holds_the_end_of_a_turn_is_refused(tokenizer):
    with pytest.raises(Malformed, match=r"the answer '1<\|end\|>2' holds '<\|end\|>', at which sampling"):
        encode_chat([USER, Message("assistant", "1<|end|>2", train=True)], ChatTemplate(tokenizer))
