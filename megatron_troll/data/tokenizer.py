"""Tokenizers in Hugging Face format, and the ids of stop tokens."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_troll.data.rows import DataError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; no code of the folder is run. Raises DataError if it is missing or has
    no chat template."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; expected a model in Hugging Face format")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template")
    return tokenizer


def stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    stop: Sequence[str] = (),
    key: str = "rollout.sampling.stop",
) -> tuple[int, ...]:
    """Sorted ids of the stop tokens: the tokenizer's end of sequence, those of the folder's
    generation_config.json, and the tokens of `stop`, which the configuration has at `key`. Raises DataError
    if a stop text is not one token, or there is no stop token at all."""
    ids = {_single_token(text, tokenizer, key) for text in stop} | set(_generation_eos(Path(folder)))
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise DataError(
            f"{folder}: nothing ends a response: neither the tokenizer nor generation_config.json names "
            f"an end of sequence, and {key} is empty"
        )
    return tuple(sorted(ids))


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise DataError if the tokenizer can produce an id for which a model of `vocab_size` has no row."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer gives {token!r} the id {highest}, but the model's vocab_size is {vocab_size}: "
            "tokenizer and model do not belong together"
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


def _single_token(text: str, tokenizer: PreTrainedTokenizerBase, key: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or tokenizer.decode(ids) != text:
        raise DataError(
            f"{key}: {text!r} is not one token of the tokenizer (it encodes to {ids}); "
            "sampling can only stop at single tokens"
        )
    return ids[0]


def _generation_eos(folder: Path) -> list[int]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return []
    try:
        eos = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a JSON object: {error}") from error
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(item, int) for item in ids):
        raise DataError(f"{path}: eos_token_id must be an id or a list of ids, got {eos!r}")
    return ids
