"""Demonstrations for the supervised warm start: chats whose assistant turns carry loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_troll.data.chat import encode_chat
from megatron_troll.data.messages import demonstration_messages
from megatron_troll.data.rows import DataError, Malformed, Row, read_rows
from megatron_troll.types import Message, Prompt, Rollout


@dataclass(frozen=True)
class Demonstration:
    """One chat; `where` is its place in its file, for errors."""

    where: str
    messages: tuple[Message, ...]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
        """Ids [T] int64 and loss mask [T] float32. Raises DataError naming the place."""
        try:
            return encode_chat(self.messages, tokenizer)
        except DataError as error:
            raise DataError(f"{self.where}: {error}") from error

    def example(self, tokenizer: PreTrainedTokenizerBase) -> Rollout:
        """The chat as a Rollout, from which batches are built: its first token is the prompt. Raises like
        `encode`."""
        ids, mask = self.encode(tokenizer)
        return Rollout(
            prompt=Prompt(self.where, self.messages, ""),
            group=0,
            sample=0,
            prompt_ids=ids[:1],
            response_ids=ids[1:],
            mask=mask[1:],
            logp=np.zeros(len(ids) - 1, dtype=np.float32),
            uniform=np.zeros(len(ids) - 1),
            topk=None,
            text="",
            finish="stop",
            versions=np.zeros(len(ids) - 1, dtype=np.int64),
            temperature=1.0,
        )


def load_demonstrations(files: Sequence[str]) -> tuple[Demonstration, ...]:
    """Every record {"messages": [...]} of the files, repeats included. Assistant turns carry loss unless
    they have `"train": false`. Raises DataError with file and line for a malformed record."""
    return tuple(_demonstration(row) for path in files for row in read_rows(path))


def _demonstration(row: Row) -> Demonstration:
    try:
        if row.problem:
            raise Malformed(row.problem)
        return Demonstration(row.where, demonstration_messages(row.value.get("messages"), "messages"))
    except Malformed as error:
        raise DataError(f"{row.where}: {error}") from error
