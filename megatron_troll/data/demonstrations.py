"""Demonstrations for the supervised warm start: chats whose assistant turns carry loss."""

from dataclasses import dataclass, field

import numpy as np

from megatron_troll.config import WarmStart
from megatron_troll.data.chat import Overlong, encode_chat
from megatron_troll.data.messages import demonstration_messages
from megatron_troll.data.rows import DataError, Malformed, Row, read_rows
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt, Rollout, marked


@dataclass
class Demonstrations:
    """The demonstrations of some files as rollouts, from which batches are built, and what was skipped."""

    examples: list[Rollout] = field(default_factory=list)
    rows: int = 0
    malformed: int = 0
    first_malformed: str = ""

    def __str__(self) -> str:
        skipped = f", {self.malformed:,} malformed skipped (first: {self.first_malformed})"
        return f"{len(self.examples):,} demonstrations" + (skipped if self.malformed else "")


def load_demonstrations(config: WarmStart, template: ChatTemplate, longest: int) -> Demonstrations:
    """Every record {"messages": [...]} of the files, repeats included. Assistant turns carry loss unless
    they have `"train": false`. Raises DataError with file and line for a malformed record, unless `config`
    says to skip it, and for one of more than `longest` tokens."""
    found = Demonstrations()
    for path in config.files:
        for row in read_rows(path):
            found.rows += 1
            try:
                found.examples.append(_example(row, template, longest))
            except Overlong as error:
                raise DataError(
                    f"{row.where}: {error}, more than the model's max_position_embeddings {longest}"
                ) from error
            except Malformed as error:
                if config.malformed == "error":
                    raise DataError(
                        f"{row.where}: {error} (sft.malformed=skip skips and counts it)"
                    ) from error
                found.malformed += 1
                found.first_malformed = found.first_malformed or f"{row.where}: {error}"
    if not found.examples:
        raise DataError(f"{', '.join(config.files)}: no usable demonstration; {found}")
    return found


def _example(row: Row, template: ChatTemplate, longest: int) -> Rollout:
    """The chat of a row as a Rollout: its first token is the prompt. Raises Malformed or Overlong."""
    if row.problem:
        raise Malformed(row.problem)
    messages = demonstration_messages(row.value.get("messages"), "messages")
    ids, mask = encode_chat(messages, template, longest)
    return example_of(row.where, messages, ids, mask)


def example_of(where: str, messages: tuple[Message, ...], ids: np.ndarray, mask: np.ndarray) -> Rollout:
    """A demonstration of ids [T] int64 and mask [T] float32; `where`, its place in its file, is its name."""
    return Rollout(
        prompt=Prompt(where, messages, ""),
        group=0,
        sample=0,
        prompt_ids=ids[:1].astype(np.int32),
        response_ids=ids[1:].astype(np.int32),
        marks=marked(mask[1:], np.zeros(len(ids) - 1)),
        logp=np.zeros(len(ids) - 1, dtype=np.float32),
        key=0,
        topk=None,
        text="",
        finish="stop",
        temperature=1.0,
    )
