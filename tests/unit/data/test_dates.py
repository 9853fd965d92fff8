"""A chat template that writes today's date writes that of the run."""

import datetime
import json

import pytest

from megatron_troll.config import ConfigError
from megatron_troll.data import dates
from megatron_troll.data.dates import folder_writes_date, with_date, writes_date
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message

# The parts of published templates that write the date, Llama 3.2's and SmolLM3's.
LLAMA = """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}"""
SMOLLM = """\
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\\n" -}}"""
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
USER = (Message("user", "sort 21"),)


@pytest.mark.parametrize(("template", "said"), [(LLAMA, "05 Nov 2026\n\n"), (SMOLLM, "05 November 2026\n")])
def test_the_date_is_the_runs(tokenizer, template, said):
    tokenizer.chat_template = template + PLAIN
    assert writes_date(template)
    assert ChatTemplate(tokenizer, date="2026-11-05").text(USER, answer=True) == f"Today Date: {said}sort 21"


@pytest.mark.parametrize("template", [LLAMA, SMOLLM])
def test_on_the_day_itself_it_is_what_transformers_writes(tokenizer, template):
    tokenizer.chat_template = template + PLAIN
    turns = [{"role": "user", "content": "sort 21"}]
    for _ in range(2):  # the second time if midnight was between the two
        today = datetime.datetime.now().date().isoformat()
        theirs = tokenizer.apply_chat_template(turns, tokenize=False)
        if theirs == ChatTemplate(tokenizer, date=today).text(USER, answer=False):
            return
    raise AssertionError(theirs)


def test_an_argument_wins_over_the_date(tokenizer):
    tokenizer.chat_template = LLAMA + PLAIN
    template = ChatTemplate(tokenizer, {"date_string": "1 May"}, "2026-11-05")
    template.check("data.template_arguments")
    assert template.text(USER, answer=True) == "Today Date: 1 May\n\nsort 21"


def test_a_date_is_needed_only_where_one_is_written(tokenizer):
    tokenizer.chat_template = SMOLLM
    with pytest.raises(ConfigError, match="date: missing"):
        ChatTemplate(tokenizer)
    tokenizer.chat_template = PLAIN
    assert ChatTemplate(tokenizer, date="2026-11-05").text(USER, answer=True) == "sort 21"


def test_the_clock_is_no_argument(tokenizer):
    tokenizer.chat_template = SMOLLM
    template = ChatTemplate(tokenizer, {"strftime_now": "x"}, "2026-11-05")
    with pytest.raises(ConfigError, match="strftime_now: is given to every chat template already"):
        template.check("data.template_arguments")


@pytest.mark.parametrize("call", ['strftime_now("%d" + x)', "strftime_now(format)", "f(strftime_now)"])
def test_a_date_that_cannot_be_fixed_is_refused(call):
    with pytest.raises(ConfigError, match=r"calls strftime_now with something else than one plain text"):
        with_date("{{ " + call + " }}", "2026-11-05")


def test_the_time_of_day_is_midnight():
    assert with_date("{{ strftime_now( '%Y %H:%M' ) }}", "2026-11-05") == "{{ '2026 00:00' }}"


@pytest.mark.parametrize("file", dates.TEMPLATE_FILES)
def test_a_folder_is_recognised_without_its_tokenizer(tmp_path, file):
    (tmp_path / file).write_text(PLAIN if file.endswith("jinja") else json.dumps({"chat_template": PLAIN}))
    assert not folder_writes_date(tmp_path)
    (tmp_path / file).write_text(SMOLLM if file.endswith("jinja") else json.dumps({"chat_template": SMOLLM}))
    assert folder_writes_date(tmp_path)
