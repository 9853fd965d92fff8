"""The model that the test servers serve: tiny, with every weight away from trivial, and K = 64 of its law."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_troll.data.chat import tokenized
from megatron_troll.data.demo_model import END, character_tokenizer
from megatron_troll.data.stops import stop_tokens
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.types import Message, Prompt
from tests.dist.tiny import DENSE, MOE, write_reference

TOKENIZER = character_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)
VOCAB = 64
CONFIG = MOE | {"vocab_size": VOCAB, "eos_token_id": END_ID}
TEXTS = ("sort 3142", "add 17 and 25", "hello", "what is 9*9?", "abc", "x" * 40)


def prompts_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[Prompt, ...]:
    asked = [Prompt(f"p{i}", (Message("user", text),), "") for i, text in enumerate(texts)]
    return tuple(tokenized(asked, ChatTemplate(tokenizer)))


PROMPTS = prompts_of(TEXTS, TOKENIZER)


def write_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder with its tokenizer. `changes` are to its configuration."""
    base = DENSE if changes.get("model_type") == "qwen3" else CONFIG
    write_reference({**base, "eos_token_id": END_ID, **changes}, folder, seed)
    TOKENIZER.save_pretrained(folder)
    return folder


def ends(folder: Path, vocab: int = VOCAB) -> tuple[int, ...]:
    return stop_tokens(ChatTemplate(load_tokenizer(folder)), folder, vocab).ids
