"""Chats as token ids: prompts for sampling, and demonstrations with a loss mask over their turns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_troll.data.rows import DataError, Malformed
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt

THINK, THOUGHT = "<think>", "</think>"
NO_LIMIT = 2**62


class Overlong(ValueError):
    """A chat has more tokens than it may have; the message says how many."""


def tokenized(prompts: Sequence[Prompt], template: ChatTemplate) -> list[Prompt]:
    """The prompts with their `ids` and `opens_reasoning`. Raises DataError naming the first that has none."""
    ready = []
    for prompt, found in zip(prompts, encoded(prompts, template)):
        if not isinstance(found, Prompt):
            raise DataError(f"prompt {prompt.id!r}: {found}") from found
        ready.append(found)
    return ready


def encoded(
    prompts: Sequence[Prompt], template: ChatTemplate, longest: int = NO_LIMIT
) -> list[Prompt | Malformed | Overlong]:
    """Every prompt with the `ids` [P] int32 of its chat up to where the answer is sampled, P <= longest, and
    `opens_reasoning`; or the reason why it has none. All are encoded in one call of the tokenizer."""
    written: set[tuple[str, bool]] = set()
    texts = [_prompt_text(prompt.messages, template, longest, written) for prompt in prompts]
    every = iter(template.encode_all([text for text in texts if isinstance(text, str)]))
    return [
        _with_ids(prompt, text, next(every), longest) if isinstance(text, str) else text
        for prompt, text in zip(prompts, texts)
    ]


def _with_ids(
    prompt: Prompt, text: str, ids: list[int] | Malformed, longest: int
) -> Prompt | Malformed | Overlong:
    if isinstance(ids, Malformed):
        return ids
    if len(ids) > longest:
        return Overlong(f"{len(ids)} tokens")
    opens = text.rstrip().endswith(THINK)
    return replace(prompt, ids=np.array(ids, dtype=np.int32), opens_reasoning=opens)


def _prompt_text(
    chat: tuple[Message, ...], template: ChatTemplate, longest: int, written: set[tuple[str, bool]]
) -> str | Malformed | Overlong:
    try:
        _check_size(chat, template, longest)
        text = template.text(chat, answer=True)
        template.check_roles(chat, written)
    except (Malformed, Overlong) as error:
        return error
    return text


def _check_size(chat: Sequence[Message], template: ChatTemplate, longest: int) -> None:
    """Raise Overlong for a chat that must have more than `longest` tokens, by its turns and characters alone:
    rendering and encoding many megabytes would take minutes."""
    characters = sum(len(message.role) + len(message.content) for message in chat)
    if len(chat) > longest or characters > template.most_characters(longest):
        raise Overlong(f"over {longest} tokens: {len(chat)} turns of {characters} characters")


@dataclass(frozen=True)
class Turn:
    """An assistant's turn as text: what stands before it, up to where sampling begins; the answer; the token
    that ends it; and what the template writes after that token, which is never sampled."""

    prompt: str
    answer: str
    end: str
    tail: str

    @property
    def sampled(self) -> str:
        """The chat up to the end of the turn."""
        return self.prompt + self.answer + self.end


def encode_chat(
    messages: Sequence[Message], template: ChatTemplate, longest: int = NO_LIMIT
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] int64 and loss mask [T] float32 of a whole chat.

    The mask is 1 on the content and the end-of-turn token of every turn with `train`. Such a turn has the ids
    that sampling would give it: those of the prompt before it, which end where sampling begins, then those of
    the answer, even if the tokenizer would join the two. Raises Malformed if the template does not write
    the turn as an answer to that prompt, or writes it differently when more follows; Overlong if T would be
    more than `longest`.
    """
    _check_size(messages, template, longest)
    whole, done, last = template.text(messages, answer=False), 0, ""
    (whole_ids,) = template.encode_all([whole])
    if isinstance(whole_ids, list) and len(whole_ids) > longest:
        raise Overlong(f"{len(whole_ids)} tokens")
    template.check_roles(messages, set())
    ids: list[int] = []
    mask: list[float] = []
    for index, message in enumerate(messages):
        if not message.train:
            continue
        turn = _turn(messages, index, template)
        if index == len(messages) - 1:
            whole = turn.sampled + turn.tail
        elif not whole.startswith(turn.sampled):
            raise Malformed(
                f"the chat template writes turn {index + 1} ({message.content!r:.60}) differently when more "
                'follows, so its tokens cannot be located; set "train": false in that turn, or train on '
                "chats of one answer"
            )
        before, answer = _answer_ids(last, whole[done : len(turn.prompt)], turn, template)
        ids += before + answer
        mask += [0.0] * len(before) + [1.0] * len(answer)
        done, last = len(turn.sampled), turn.end
    ids += _ids_after(last, whole[done:], template)
    mask += [0.0] * (len(ids) - len(mask))
    if len(ids) > longest:
        raise Overlong(f"{len(ids)} tokens")
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.float32)


def _answer_ids(last: str, before: str, turn: Turn, template: ChatTemplate) -> tuple[list[int], list[int]]:
    """Ids of the text between the last turn's end and this answer, and of the answer with its end."""
    prompt, answer = _ids_after(last, before, template), template.encode(turn.answer)
    (together,) = template.encode_all([last + before + turn.answer])
    after = len(prompt) + (1 if last else 0)
    # A tokenizer may begin every text with a space: the answer goes on, unless it would join the prompt.
    if isinstance(together, list) and together[:after] == template.encode(last + before):
        answer = together[after:]
    end = template.end_of_turn
    if end is None or end in answer:
        raise Malformed(f"the answer {turn.answer!r:.60} holds {turn.end!r}, at which sampling would stop")
    return prompt, [*answer, end]


def _ids_after(last: str, text: str, template: ChatTemplate) -> list[int]:
    """Ids of a text that follows a special token, which may change how it begins."""
    return template.encode(last + text)[1 if last else 0 :]


def _turn(messages: Sequence[Message], index: int, template: ChatTemplate) -> Turn:
    if index == 0 or messages[index].role != "assistant":
        raise Malformed(f"turn {index + 1} carries loss, but only an assistant turn after another turn may")
    if template.end_of_turn is None:
        raise Malformed(
            "the chat template ends an assistant's turn with no special token, so sampling would not stop"
        )
    end = template.token(template.end_of_turn)
    prompt = template.text(messages[:index], answer=True)
    through = template.text(messages[: index + 1], answer=False)
    head, found, tail = through.rpartition(end)
    if not found:
        raise Malformed(f"the chat template does not end turn {index + 1} with {end!r}")
    if head.startswith(prompt):
        return Turn(prompt, head[len(prompt) :], end, tail)
    if index == len(messages) - 1 and prompt.rstrip().endswith(THINK):
        return Turn(prompt, _reasoned(messages[index].content, index), end, tail)
    raise Malformed(
        f"the chat template does not write turn {index + 1} as an answer to what comes before it: sampling "
        f"continues {prompt[-40:]!r}, and the template writes {through[_common(prompt, through) :]!r:.60} "
        f"in place of {prompt[_common(prompt, through) :]!r:.60}"
    )


def _reasoned(content: str, index: int) -> str:
    """The answer of a chat whose prompt opens <think>, for a template that leaves reasoning out of finished
    turns: the text as it was sampled. Raises Malformed if the reasoning does not end."""
    if THOUGHT not in content:
        raise Malformed(
            f"turn {index + 1} holds no reasoning, but the chat template opens {THINK} where sampling "
            f"begins: write it as REASONING{THOUGHT}ANSWER, or choose data.template_arguments with which it "
            "opens none"
        )
    return content.removeprefix(THINK).removeprefix("\n")


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    pairs = enumerate(zip(one, other))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
