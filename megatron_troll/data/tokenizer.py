"""Tokenizers in Hugging Face format."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_troll.data.dates import TEMPLATE_FILES
from megatron_troll.data.rows import DataError

DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; no code of the folder is run. Raises DataError if it is missing or has
    no chat template."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; expected a model in Hugging Face format")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _restore_parts(tokenizer, Path(folder) / "tokenizer.json")
    except Exception as error:  # tokenizers raises no narrower class for a damaged tokenizer.json
        if type(error) is not Exception and not isinstance(error, DAMAGE):
            raise
        raise DataError(
            f"{folder}: the tokenizer cannot be loaded: {type(error).__name__}: {error!s:.500}"
        ) from error
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: the tokenizer has no chat template, neither in {TEMPLATE_FILES[0]} nor in "
            f"{TEMPLATE_FILES[-1]}: write one to {Path(folder) / TEMPLATE_FILES[0]}, such as that of the "
            "family's instruct model"
        )
    try:
        tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise DataError(f"{folder}: {error}") from error
    return tokenizer


def _restore_parts(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give `tokenizer` the parts that its tokenizer.json has. transformers 5 replaces them without a word by
    those of the class that it knows for the model_type of config.json, such as Qwen2.5's for qwen2."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and file.is_file():
        published = Tokenizer.from_file(str(file))
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            setattr(backend, part, getattr(published, part))


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise DataError if the tokenizer can produce an id for which a model of `vocab_size` has no row."""
    known = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    beyond = [(token, index) for token, index in known if index >= vocab_size]
    if beyond:
        shown = ", ".join(f"{token!r:.40} ({index})" for token, index in beyond[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer has tokens beyond the model's vocab_size {vocab_size}: "
            f"{shown}{more}: tokenizer and model do not belong together, or tokens were added for which the "
            "embedding was not enlarged: enlarge it, or take them out of tokenizer.json"
        )


def check_reasoning_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError if texts lack </think> because the tokenizer has it as a special token."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if "</think>" in special:
        raise DataError(
            "the tokenizer leaves </think> out of texts, because it is a special token: the end of reasoning "
            'cannot be found. Give it "special": false in tokenizer.json and tokenizer_config.json, or set '
            "reward.reasoning=keep"
        )
