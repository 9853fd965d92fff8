"""Convert a record of a known schema to a Prompt.

dapo      {"prompt": [turns], "reward_model": {"ground_truth": ...}, "extra_info": {"index": ...}, ...}, the
          columns of DAPO-Math-17k and of every data set prepared for verl
gsm8k     the same, or GSM8K as published: {"question": ..., "answer": "... #### 18"}
messages  {"id": ..., "messages": [turns], "answer": ...}
"""

from collections.abc import Callable
from typing import Any

from megatron_troll.data.messages import prompt_messages
from megatron_troll.data.rows import Malformed
from megatron_troll.types import Message, Prompt

Record = dict[str, Any]


def detect(record: Record) -> str:
    """The schema of a file, found from its first record. Raises Malformed if none fits."""
    if "messages" in record:
        return "messages"
    if "question" in record and "answer" in record:
        return "gsm8k"
    if "prompt" in record and "reward_model" in record:
        return "dapo"
    raise Malformed(
        f"no known schema has the fields {sorted(record)!s:.200}; expected 'messages' and 'answer', "
        "'prompt' and 'reward_model' (DAPO), or 'question' and 'answer' (GSM8K)"
    )


def to_prompt(schema: str, record: Record) -> Prompt:
    """The prompt of one record; all fields except the chat and its id stay in `Prompt.record`.
    Raises Malformed."""
    return SCHEMAS[schema](record)


def _messages(record: Record) -> Prompt:
    messages = prompt_messages(_need(record, "messages"), "messages")
    answer = _text(_need(record, "answer"), "answer")
    name = record.get("id")
    return Prompt(_id(name, messages), messages, answer, _rest(record, "id", "messages"))


def _verl(record: Record) -> Prompt:
    messages = prompt_messages(_need(record, "prompt"), "prompt")
    reward_model = _need(record, "reward_model")
    if not isinstance(reward_model, dict):
        raise Malformed(f"'reward_model' must be an object, got {reward_model!r:.80}")
    answer = _text(_need(reward_model, "ground_truth"), "reward_model.ground_truth")
    return Prompt(_id(_verl_index(record), messages), messages, answer, _rest(record, "prompt"))


def _verl_index(record: Record) -> Any:
    """The index of a record: a text is unique by itself, a number only together with source and split."""
    extra = record.get("extra_info") or {}
    index = extra.get("index") if isinstance(extra, dict) else None
    if not isinstance(index, int):
        return index
    parts = [record.get("data_source"), extra.get("split"), index]
    return "/".join(str(part) for part in parts if part is not None)


def _gsm8k(record: Record) -> Prompt:
    if "question" not in record:
        return _verl(record)
    messages = (Message("user", _text(record["question"], "question")),)
    solution = _text(_need(record, "answer"), "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark:
        raise Malformed("'answer' has no '#### <number>'")
    answer = _text(answer.strip().replace(",", ""), "answer after ####")
    return Prompt(_id(None, messages), messages, answer, _rest(record, "question"))


SCHEMAS: dict[str, Callable[[Record], Prompt]] = {"dapo": _verl, "gsm8k": _gsm8k, "messages": _messages}


def _id(name: Any, messages: tuple[Message, ...]) -> str:
    """The record's own id, or 16 hex digits of the hash of its chat."""
    if name is None:
        return Prompt("", messages, "").text_key[:16]
    return _text(name, "id")


def _need(record: Record, field: str) -> Any:
    if record.get(field) is None:
        fields = ", ".join(map(str, record)) or "none"
        raise Malformed(f"field {field!r} is missing (fields: {fields:.200})")
    return record[field]


def _text(value: Any, field: str) -> str:
    """`value` as text that is not empty; an integer is converted to text. Raises Malformed."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise Malformed(f"{field!r} must be text that is not empty, got {value!r:.80}")
    return value


def _rest(record: Record, *used: str) -> Record:
    return {key: value for key, value in record.items() if key not in used}
