"""Arguments of a chat template, what it may raise, and the token that ends a turn."""

import pytest

from megatron_troll.config import ConfigError
from megatron_troll.data.chat import tokenized
from megatron_troll.data.rows import Malformed
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt

USER = Message("user", "sort 21")
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is false %}no{% endif %}{% endif %}"
)


def test_arguments_reach_the_template(tokenizer):
    tokenizer.chat_template = THINKING
    for arguments, end in (({}, ""), ({"enable_thinking": True}, ""), ({"enable_thinking": False}, "no")):
        template = ChatTemplate(tokenizer, arguments)
        template.check("data.template_arguments")
        (prompt,) = tokenized([Prompt("p", (USER,), "")], template)
        assert tokenizer.decode(prompt.ids) == f"<|user|>sort 21<|end|><|assistant|>{end}"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("enable_thinkng", "the chat template reads no 'enable_thinkng'; did you mean 'enable_thinking'?"),
        ("zzz", "the chat template reads no 'zzz'; leave it out"),
        ("messages", "is given to every chat template already; leave it out"),
        ("tokenize", "is given to every chat template already; leave it out"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(tokenizer, name, said):
    tokenizer.chat_template = THINKING
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(tokenizer, {name: True}).check("data.template_arguments")
    assert str(caught.value) == f"data.template_arguments.{name}: {said}"


@pytest.mark.parametrize(
    "code",
    [
        "raise_exception('no')",
        "messages[0].content + 1",
        "1 / 0",
        "messages[9].content",
        "messages[0].content.index('z')",
        "range(10 ** 9)",
        "''.__class__.__mro__",
    ],
)
def test_an_error_of_the_templates_code_is_malformed_data(tokenizer, code):
    tokenizer.chat_template = "{{ " + code + " }}"
    with pytest.raises(Malformed, match=r"the chat template refuses a chat of the roles user: ."):
        ChatTemplate(tokenizer).text([USER], answer=True)


def test_the_first_special_token_after_an_answer_ends_the_turn(tokenizer):
    assert ChatTemplate(tokenizer).end_of_turn == 4
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <|end|><pad>{% endfor %}"
    assert ChatTemplate(tokenizer).end_of_turn == 4


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}{% endfor %}", "x<|end|>"])
def test_a_template_may_end_no_turn(tokenizer, template):
    tokenizer.chat_template = template
    assert ChatTemplate(tokenizer).end_of_turn is None
