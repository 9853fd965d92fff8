"""The tokens that end a response: ends of sequence, the end of a turn, and those that the run names."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_troll.data.rows import DataError, Malformed
from megatron_troll.data.template import ChatTemplate

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class StopTokens:
    """Ids of tokens that end a response.

    declared  ends of sequence, by tokenizer, config.json and generation_config.json
    turn      the token with which the chat template ends an assistant's turn, which a warm start teaches
    asked     the stop tokens of the run's configuration
    remark    a sentence about `turn`, if nothing declares it; otherwise empty
    """

    declared: frozenset[int]
    turn: int | None
    asked: frozenset[int]
    remark: str = ""

    @property
    def exported(self) -> tuple[int, ...]:
        """The ends of sequence of a model that was trained on turns, ascending."""
        return tuple(sorted(self.declared if self.turn is None else self.declared | {self.turn}))

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token at which sampling stops, ascending."""
        return tuple(sorted({*self.exported, *self.asked}))


def stop_tokens(
    template: ChatTemplate,
    folder: str | Path,
    vocab: int,
    stop: Sequence[str] = (),
    key: str = "rollout.sampling.stop",
) -> StopTokens:
    """The stop tokens of a model of `vocab` rows in `folder`, and those of `stop`, which the configuration
    has at `key`. Raises DataError if a stop text is not one token, if a file names an id that no model can
    sample, or if there is no stop token at all."""
    asked = frozenset(_single_token(text, template, key) for text in stop)
    declared = set[int]()
    for name in ("config.json", GENERATION_CONFIG):
        declared |= _declared(Path(folder) / name, vocab)
    if isinstance(template.tokenizer.eos_token_id, int):
        declared.add(template.tokenizer.eos_token_id)
    turn = template.end_of_turn
    stops = StopTokens(
        frozenset(declared), turn, asked, _remark(template, declared, asked, turn, folder, key)
    )
    if not stops.ids:
        raise DataError(
            f"{folder}: nothing ends a response: neither the tokenizer nor {GENERATION_CONFIG} names an end "
            f"of sequence, the chat template ends no turn, and {key} is empty"
        )
    return stops


def _remark(
    template: ChatTemplate,
    declared: set[int],
    asked: frozenset[int],
    turn: int | None,
    folder: str | Path,
    key: str,
) -> str:
    ending, ids = template.after_answer
    if turn is None and ending.strip() and not (declared | asked) & set(ids):
        return (
            f"WARNING: the chat template ends a turn with {ending.strip()!r}, which is no special token, so "
            f"that no answer stops there: make it special in the tokenizer, or name it in {key}"
        )
    if turn is None or turn in declared:
        return ""
    named = ", ".join(repr(template.token(token)) for token in sorted(declared)) or "nothing"
    return (
        f"the chat template ends a turn with {template.token(turn)!r}, {folder} ends a sequence with "
        f"{named}: sampling stops at either, and an export names both"
    )


def _single_token(text: str, template: ChatTemplate, key: str) -> int:
    try:
        ids = template.encode(text)
    except Malformed as error:
        raise DataError(f"{key}: {error}") from error
    if len(ids) != 1 or template.tokenizer.decode(ids) != text:
        raise DataError(
            f"{key}: {text!r} is not one token of the tokenizer (it encodes to {ids}); "
            "sampling can only stop at single tokens"
        )
    return ids[0]


def _declared(path: Path, vocab: int) -> set[int]:
    """The ids under eos_token_id of a JSON file, and of its text_config if it has one; none if there is no
    file. Raises DataError."""
    if not path.is_file():
        return set()
    try:
        content = json.loads(path.read_bytes())
        named = [each.get("eos_token_id") for each in (content, content.get("text_config") or {})]
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a JSON object: {error}") from error
    return {token for eos in named for token in _checked(eos, path, vocab)}


def _checked(eos: Any, path: Path, vocab: int) -> list[int]:
    ids: list[Any] = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for token in ids:
        if type(token) is not int:
            raise DataError(f"{path}: eos_token_id must be an id or a list of ids, got {eos!r:.80}")
        if not 0 <= token < vocab:
            raise DataError(
                f"{path}: eos_token_id: no model of {vocab} tokens can sample {token}; "
                f"expected 0 to {vocab - 1}"
            )
    return ids
