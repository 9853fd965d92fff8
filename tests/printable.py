"""The demo's model with a token for every printable character, for tasks that have more of them."""

import json
import string
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from megatron_troll.data.demo_model import character_tokenizer, write_base


def printable_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(string.printable)


def write_printable(folder: Path, **config: int) -> None:
    """Write the untrained model, with fields of `config` in its config.json."""
    write_base(folder)
    printable_tokenizer().save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"vocab_size": 128} | config))
