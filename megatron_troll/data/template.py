"""A tokenizer's chat template: the text and the token ids of chats, and the token that ends a turn."""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_troll.config import ConfigError, nearest
from megatron_troll.data.dates import NAME, with_date, writes_date
from megatron_troll.data.rows import Malformed
from megatron_troll.types import Message

# Errors of the code in a template: jinja2's own, and those of the Python that it evaluates.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
PROBE = "QqProbeqQ"  # a text that no template and no chat contains


class ChatTemplate:
    """The chat template of a tokenizer, with the `arguments` that it gets besides the chat
    (data.template_arguments), and the `date` (YYYY-MM-DD) that it writes, if it writes one. Raises
    ConfigError if that is missing or cannot be fixed."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        own = str(tokenizer.get_chat_template())
        if writes_date(own) and date is None:
            raise ConfigError("date: missing, and the chat template writes one into prompts")
        self._template = own if date is None else with_date(own, date)

    def check(self, key: str) -> None:
        """Raise ConfigError if the template reads no argument of some name; `key` is the arguments' place in
        the configuration."""
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        words = set(re.findall(r"[A-Za-z_]\w*", self._template)) - {"messages"}
        for name in self.arguments:
            if name in reserved or name in ("messages", NAME):
                raise ConfigError(f"{key}.{name}: is given to every chat template already; leave it out")
            if name not in words:
                raise ConfigError(f"{key}.{name}: the chat template reads no {name!r}; {_hint(name, words)}")

    def text(self, messages: Sequence[Message], answer: bool) -> str:
        """A chat as text; with `answer`, up to where the assistant's next turn is sampled. Raises
        Malformed."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=answer,
                    **self.arguments,
                )
            )
        except TEMPLATE_ERRORS as error:
            roles = ", ".join(dict.fromkeys(message.role for message in messages))
            raise Malformed(
                f"the chat template refuses a chat of the roles {roles:.80}: {error or type(error).__name__}"
            ) from error

    def check_roles(self, messages: Sequence[Message], written: set[tuple[str, bool]]) -> None:
        """Raise Malformed if the template leaves out turns of a role other than the assistant's. What it does
        write, (role, whether at the start of a chat), joins `written` and is not tried again."""
        for index, message in enumerate(messages):
            place = message.role, index == 0
            if place in written or message.role == "assistant":
                continue
            probed = [*messages[:index], Message(message.role, PROBE), *messages[index + 1 :]]
            if PROBE not in self.text(probed, answer=False):
                raise Malformed(
                    f"turn {index + 1}: the chat template leaves out a turn of the role {message.role!r:.80}"
                )
            written.add(place)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises Malformed for a text that the tokenizer cannot encode."""
        (ids,) = self.encode_all([text])
        if isinstance(ids, Malformed):
            raise ids
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int] | Malformed]:
        """Token ids of every text, in one call of the tokenizer, which uses every core; the reason in place
        of the ids of a text that it cannot encode."""
        try:
            return [*self._batch(list(texts))]
        except Exception as error:
            if type(error) not in UNENCODABLE:
                raise
            if len(texts) == 1:
                return [Malformed(self._why(texts[0], error))]
            return [one for text in texts for one in self.encode_all([text])]

    def _batch(self, texts: list[str]) -> list[list[int]]:
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
        # The tokenizer's own batch call computes offsets and masks too, which nothing reads here.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _why(self, text: str, error: Exception) -> str:
        """The reason for which a text cannot be encoded: the first character that cannot, if one alone is at
        fault."""
        for added in self._added.values():
            text = text.replace(added.content, "")
        characters = dict.fromkeys(text)
        for character in characters if len(characters) > 1 else ():
            if isinstance(self.encode_all([character])[0], Malformed):
                return f"the tokenizer has no token for {character!r} (U+{ord(character):04X})"
        return f"the tokenizer cannot encode {text!r:.80}: {error}"

    @cached_property
    def end_of_turn(self) -> int | None:
        """The id of the special token that ends an assistant's turn, the first one after its text; None if
        the template writes none."""
        return next((token for token in self.after_answer[1] if token in self.special_ids), None)

    @cached_property
    def after_answer(self) -> tuple[str, list[int]]:
        """The text that the template writes after an assistant's, and its ids; "" and [] if it writes none,
        or what cannot be encoded."""
        chat = (Message("user", PROBE), Message("assistant", PROBE))
        try:
            _, found, tail = self.text(chat, answer=False).rpartition(PROBE)
            return (tail, self.encode(tail)) if found else ("", [])
        except Malformed:
            return "", []

    @cached_property
    def special_ids(self) -> set[int]:
        known: list[int] = self.tokenizer.all_special_ids  # pyright: ignore[reportAssignmentType]
        return {index for index, token in self._added.items() if token.special} | set(known)

    @property
    def _added(self) -> dict[int, Any]:
        return self.tokenizer.added_tokens_decoder  # pyright: ignore[reportReturnType]

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def most_characters(self, tokens: int) -> int:
        """Number of characters that this many tokens cannot exceed, with room for a tokenizer that drops or
        joins most of them."""
        return 8 * tokens * self._longest_token

    def token(self, index: int) -> str:
        """The text of a special token."""
        return str(self.tokenizer.convert_ids_to_tokens(index))


# What tokenizers raises for a text that it cannot encode: its plain Exception for a character without a
# token, the others for half a character.
UNENCODABLE = (Exception, TypeError, UnicodeEncodeError)


def _hint(name: str, words: set[str]) -> str:
    hint = nearest(name, words)
    return hint if hint.startswith("did") else "leave it out"
