r"""The columns of known data sets, told by a row, and how a row becomes a prompt.

dapo           {"prompt": chat, "reward_model": {"ground_truth": ...}, "extra_info": {"index": ...}}: the
               rows of DAPO-Math, of Eurus-2-RL and of every set prepared for verl
gsm8k          {"question": ..., "answer": "... #### 18"}, or the columns of dapo
livecodebench  {"question_content": ..., "public_test_cases": ..., ...}: data/livecodebench.py
math           {"problem": ..., "answer": ...}, also with the names `question` and `final_answer`; or
               {"problem": ..., "solution": "... \boxed{18}"}
messages       {"id": ..., "messages": chat, "answer": ...}
nemo_rl        {"problem": ..., "expected_answer": ...}; only where the schema is named also {"input": ...,
               "output": ...}, and {"messages": chat} whose last turn is the answer
slime          {"prompt": chat, "label": ...}
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_troll.config import AnswerForm, Origin
from megatron_troll.data import livecodebench
from megatron_troll.data.boxed import last_boxed
from megatron_troll.data.columns import Record, has, needed, text_of, value_of, without
from megatron_troll.data.messages import prompt_chat
from megatron_troll.data.rows import Malformed
from megatron_troll.types import Message, Prompt


class NoFormat(Malformed):
    """No schema has the columns of a row; the message says what to name."""


@dataclass(frozen=True)
class RowFormat:
    r"""The columns of one kind of row.

    prepared  makes these columns of the row as published, which has the columns `published`; (): these
    named     whether every row must have its name in the column `id`
    name      the name of a row that has none there; None: it has none
    mark      what no answer may hold, because it is that of another format; "": there is none
    told      whether `auto` chooses it
    """

    prompt: str | None
    answer: str | None
    form: AnswerForm = "text"
    id: str | None = None
    published: tuple[str, ...] = ()
    prepared: Callable[[Record], Record] = dict
    named: bool = False
    name: Callable[[Record], Any] = lambda record: None
    mark: str = ""
    told: bool = True

    def fits(self, record: Record) -> bool:
        """Whether a row has these columns, and an answer in this form in them."""
        columns = self.published or (self.prompt, self.answer)
        if not all(has(record, path) for path in columns if path is not None):
            return False
        return self.form in ("text", "none") or _extracts(record, self)


def _extracts(record: Record, row_format: RowFormat) -> bool:
    try:
        answer_of(record, row_format)
    except Malformed:
        return False
    return True


def _verl_name(record: Record) -> Any:
    """The index of a record: a text is unique by itself, a number only together with source and split."""
    extra = record.get("extra_info") or {}
    index = extra.get("index") if isinstance(extra, dict) else None
    if not isinstance(index, int):
        return index
    parts = [record.get("data_source"), extra.get("split"), index]
    return "/".join(str(part) for part in parts if part is not None)


def _olympiad(record: Record) -> Record:
    """OlympiadBench: a context that stands before some questions, and answers of several values."""
    context, answers = record.get("context"), value_of(record, "final_answer")
    question = needed(record, "question")
    question = f"{context}\n\n{question}" if context else question
    several = isinstance(answers, list) and len(answers) > 1
    return record | {
        "question": question,
        "final_answer": ", ".join(map(str, answers)) if several else answers,
    }


def _taught(record: Record) -> Record:
    """A chat whose last turn is the answer, as its turns and that answer."""
    turns = value_of(record, "messages")
    if not isinstance(turns, list) or len(turns) < 2 or not has(record, "messages.-1.content"):
        raise Malformed(f"'messages' must be a chat of two turns or more, got {turns!r:.80}")
    return record | {"messages": turns[:-1], "answer": turns[-1]["content"]}


GSM8K = "####"
VERL = RowFormat("prompt", "reward_model.ground_truth", name=_verl_name)
SCHEMAS: dict[str, tuple[RowFormat, ...]] = {
    "messages": (RowFormat("messages", "answer", id="id"),),
    "dapo": (VERL,),
    "slime": (RowFormat("prompt", "label"),),
    "livecodebench": (
        RowFormat(
            "question_content",
            None,
            "none",
            "question_id",
            published=livecodebench.PUBLISHED,
            prepared=livecodebench.prepared,
        ),
    ),
    "gsm8k": (RowFormat("question", "answer", "gsm8k"), VERL),
    "nemo_rl": (
        RowFormat("problem", "expected_answer"),
        RowFormat("input", "output", told=False),
        RowFormat("messages", "answer", published=("messages",), prepared=_taught, told=False),
    ),
    "math": (
        RowFormat("problem", "answer"),
        RowFormat("question", "final_answer", prepared=_olympiad),
        RowFormat("question", "answer", mark=GSM8K),
        RowFormat("problem", "solution", "boxed"),
    ),
}


def format_of(record: Record, origin: Origin, key: str) -> RowFormat:
    """The format of a file: that of the schema, which its first row tells, with the columns that its source
    names. `key` is the place of the source in the configuration. Raises NoFormat if no schema fits."""
    columns, form = origin.columns, origin.answer_form
    base = RowFormat(None, None) if origin.names_columns else _of_schema(record, origin, key)
    row_format = replace(
        base,
        prompt=columns.prompt or base.prompt,
        id=columns.id or base.id,
        named=columns.id is not None,
    )
    if form is not None:
        answer = None if form == "none" else columns.answer or base.answer
        return replace(row_format, answer=answer, form=form, mark="")
    if columns.answer is not None:
        return replace(row_format, answer=columns.answer, form="text", mark="")
    return row_format


def _of_schema(record: Record, origin: Origin, key: str) -> RowFormat:
    if origin.schema_ is not None and origin.schema_ != "auto":
        known = SCHEMAS[origin.schema_]
        return next((one for one in known if one.fits(record)), known[0])
    for one in (one for known in SCHEMAS.values() for one in known if one.told):
        unanswered = replace(one, answer=None, form="none")
        if (unanswered if origin.answer_form == "none" else one).fits(record):
            return one
    raise NoFormat(_unknown(record, key))


def _unknown(record: Record, key: str) -> str:
    """A sentence about a row that no schema fits, and what to name."""
    formats = [one for known in SCHEMAS.values() for one in known]
    prompts = sorted({one.prompt for one in formats if one.prompt in record})
    names = f"name the columns, {key}.columns={{prompt: COLUMN, answer: COLUMN}}"
    if not prompts:
        return f"no known schema has the columns {', '.join(record):.200}: {names}"
    answers = [_where(one) for one in formats if one.prompt in prompts and one.answer is not None]
    return (
        f"there is no answer that a schema knows: beside {' and '.join(prompts)} none of "
        f"{', '.join(dict.fromkeys(answers))}: {names}, or set {key}.answer_form=none for a reward that "
        "needs none"
    )


def _where(row_format: RowFormat) -> str:
    marks = {"gsm8k": " with ####", "boxed": r" with \boxed{}"}
    return f"{row_format.answer}{marks.get(row_format.form, '')}"


def answer_of(record: Record, row_format: RowFormat) -> str:
    """The answer of a row, "" if it has none. Raises Malformed."""
    if row_format.answer is None or row_format.form == "none":
        return ""
    text = text_of(needed(record, row_format.answer), row_format.answer)
    if row_format.form == "boxed":
        found = last_boxed(text)
        if found is None:
            raise Malformed(rf"the column {row_format.answer!r} has no \boxed{{}} that closes: {text!r:.80}")
    elif row_format.form == "gsm8k":
        _, mark, found = text.rpartition(GSM8K)
        if not mark:
            raise Malformed(f"the column {row_format.answer!r} has no '#### ANSWER': {text!r:.80}")
        found = found.replace(",", "")
    elif row_format.mark and row_format.mark in text:
        raise Malformed(
            f"the column {row_format.answer!r} holds {row_format.mark!r}, and that of the first row does "
            f"not: answer_form=gsm8k takes what follows it, answer_form=text all of it: {text!r:.80}"
        )
    else:
        return text
    if not found.strip():
        raise Malformed(f"the column {row_format.answer!r} has an empty answer: {text[-80:]!r}")
    return found.strip()


def to_prompt(row_format: RowFormat, record: Record) -> Prompt:
    """The prompt of one row; all columns except the chat and its name stay in `Prompt.record`. Raises
    Malformed."""
    record = row_format.prepared(record)
    assert row_format.prompt is not None
    messages = prompt_chat(needed(record, row_format.prompt), row_format.prompt)
    return Prompt(
        _name(row_format, record, messages),
        messages,
        answer_of(record, row_format),
        without(record, row_format.prompt, row_format.id),
    )


def _name(row_format: RowFormat, record: Record, messages: tuple[Message, ...]) -> str:
    """The row's own name, or 16 hex digits of the hash of its chat."""
    path = row_format.id or "id"
    if row_format.named:
        return text_of(needed(record, path), path)
    own = row_format.id is not None and has(record, row_format.id)
    name = value_of(record, path) if own else row_format.name(record)
    return Prompt("", messages, "").text_key[:16] if name is None else text_of(name, path)
