"""Chats as token ids: prompts for sampling, and demonstrations with a loss mask over their turns."""

from collections.abc import Sequence
from dataclasses import replace

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_troll.data.rows import DataError
from megatron_troll.types import Message, Prompt


def tokenized(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, places: Sequence[str] = ()
) -> list[Prompt]:
    """The prompts with `ids` and `opens_reasoning`, all in one call of the tokenizer, which uses every core.
    Raises DataError naming the first prompt that the chat template refuses, by its place in `places`,
    otherwise by its id."""
    chats = [_turns(prompt.messages) for prompt in prompts]
    try:
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError:
        named = zip(prompts, places or [f"prompt {prompt.id!r}" for prompt in prompts], strict=True)
        texts = [_text_of(prompt, place, tokenizer) for prompt, place in named]
    rendered = [str(text) for text in texts]
    return [
        replace(prompt, ids=np.array(ids, dtype=np.int32), opens_reasoning=text.rstrip().endswith("<think>"))
        for prompt, ids, text in zip(prompts, _ids_of(rendered, tokenizer), rendered)
    ]


def _ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
    # The tokenizer's own batch call computes offsets and masks too, which nothing reads here.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _text_of(prompt: Prompt, place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return _text(prompt.messages, tokenizer, answer=True)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error


def encode_chat(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int64 and loss mask [T] float32 of a whole chat.

    The mask is 1 on the content and the end-of-turn token of every turn with `train`. Each such turn is
    located by rendering the chat without it and with it, so the template must render the first turns of a
    chat as a prefix of the whole chat. Raises DataError if it does not.
    """
    ids = _render(messages, tokenizer, answer=False)
    mask = np.zeros(len(ids), dtype=np.float32)
    special = _special_ids(tokenizer)
    for index, message in enumerate(messages):
        if message.train:
            start, through = _turn_span(messages, index, ids, tokenizer)
            mask[start : _turn_end(ids, start, through, special, index)] = 1.0
    return np.array(ids, dtype=np.int64), mask


def _turn_span(
    messages: Sequence[Message], index: int, ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Token indices at which the answer of turn `index` begins and its rendering ends."""
    if index == 0 or messages[index].role != "assistant":
        raise DataError(f"turn {index + 1} carries loss, but only an assistant turn after another turn may")
    before = _render(messages[:index], tokenizer, answer=True)
    through = _render(messages[: index + 1], tokenizer, answer=False)
    for prefix, what in ((through, "through"), (before, "before")):
        if ids[: len(prefix)] != prefix:
            raise DataError(
                f"the chat template is not prefix-stable: the chat {what} turn {index + 1} "
                f"({messages[index].content!r:.60}) is rendered differently when more follows, so the tokens "
                "of the turn cannot be located; use another template, or train on chats of one answer"
            )
    return len(before), len(through)


def _turn_end(ids: list[int], start: int, through: int, special: set[int], index: int) -> int:
    """Index after the end-of-turn token, the last special token of the turn. What a template writes after
    it (a line break) is never sampled."""
    for place in range(through - 1, start - 1, -1):
        if ids[place] in special:
            return place + 1
    raise DataError(
        f"the chat template ends turn {index + 1} with no special token, so sampling would not stop"
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, answer: bool) -> list[int]:
    text = _text(messages, tokenizer, answer)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, answer: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(_turns(messages), tokenize=False, add_generation_prompt=answer)
        )
    except jinja2.TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template refuses a chat of the roles {roles}: {error}") from error


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
