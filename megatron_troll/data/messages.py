"""Chat turns as stored in files: [{"role": ..., "content": ...}, ...], or {"role": [...], "content": [...]}
as Hugging Face's `Sequence` stores them; a content may be a list of parts {"type": "text", "text": ...}.
"""

from typing import Any

from megatron_troll.data.rows import Malformed
from megatron_troll.types import Message


def read_turns(value: Any, field: str) -> list[dict[str, Any]]:
    """The turns of a chat, without keys whose value is null. Raises Malformed."""
    if isinstance(value, dict):
        value = _rows(value, field)
    if not isinstance(value, list) or not value:
        raise Malformed(f"{field!r} must be a list of one or more chat messages, got {value!r:.80}")
    return [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(value)]


def _turn(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise Malformed(f"{name} must be an object with 'role' and 'content', got {turn!r:.80}")
    turn = {key: item for key, item in turn.items() if item is not None}
    if isinstance(turn.get("content"), list):
        turn["content"] = _joined(turn["content"], f"{name}.content")
    for key in ("role", "content"):
        if not isinstance(turn.get(key), str):
            raise Malformed(f"{name}.{key} must be text, got {turn.get(key)!r:.80}")
    return turn


def _rows(columns: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """The turns of a chat that is stored as one list for each key; of a single turn."""
    if isinstance(columns.get("content"), str):
        return [columns]
    lists = [value for value in columns.values() if isinstance(value, list)]
    if len(lists) < len(columns) or len({len(values) for values in lists}) != 1:
        raise Malformed(f"{field!r} must be a list of chat messages, got {columns!r:.80}")
    return [dict(zip(columns, values)) for values in zip(*lists)]


def _joined(parts: list[Any], name: str) -> str:
    """The text of a content in parts."""
    for part in parts:
        text = isinstance(part, dict) and part.get("type", "text") == "text" and part.get("text")
        if not isinstance(text, str):
            raise Malformed(f"{name} must be text, got the part {part!r:.80}")
    return "".join(part["text"] for part in parts)


def prompt_chat(value: Any, field: str) -> tuple[Message, ...]:
    """A chat whose next turn is the policy's answer; a text is the user's turn. Raises Malformed."""
    if isinstance(value, str) and value:
        return (Message("user", value),)
    return prompt_messages(value, field)


def prompt_messages(value: Any, field: str) -> tuple[Message, ...]:
    """A chat whose next turn is the policy's answer. Raises Malformed."""
    turns = read_turns(value, field)
    for index, turn in enumerate(turns):
        _refuse_other_keys(turn, {"role", "content"}, f"{field}[{index}]")
    if turns[-1]["role"] == "assistant":
        raise Malformed(f"{field!r} ends with the assistant's turn; the policy has nothing to answer")
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def demonstration_messages(value: Any, field: str) -> tuple[Message, ...]:
    """A chat whose assistant turns carry loss unless they have `"train": false`. Raises Malformed."""
    messages = []
    for index, turn in enumerate(read_turns(value, field)):
        name = f"{field}[{index}]"
        _refuse_other_keys(turn, {"role", "content", "train"}, name)
        train = turn.get("train", turn["role"] == "assistant")
        if not isinstance(train, bool):
            raise Malformed(f"{name}.train must be true or false, got {train!r:.80}")
        if train and turn["role"] != "assistant":
            raise Malformed(f"{name} is a {turn['role']!r} turn; only assistant turns may carry loss")
        messages.append(Message(turn["role"], turn["content"], train))
    if not any(message.train for message in messages):
        raise Malformed(f"{field!r} has no assistant turn that carries loss")
    return tuple(messages)


def _refuse_other_keys(turn: dict[str, Any], known: set[str], name: str) -> None:
    other = sorted(turn.keys() - known)
    if other:
        raise Malformed(f"{name} has keys that are not read: {', '.join(other):.200}")
