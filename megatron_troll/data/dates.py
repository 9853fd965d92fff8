"""The date that chat templates write as today's: fixed for a run, or its prompts would change at midnight.

Transformers gives templates a function strftime_now, which reads the clock whenever a chat is rendered
(Llama 3.2, SmolLM3).
"""

import re
from datetime import date
from pathlib import Path

from megatron_troll.config import ConfigError

NAME = "strftime_now"
CALL = re.compile(rf"\b{NAME}\s*\(\s*(?P<format>'[^'\\]*'|\"[^\"\\]*\")\s*\)")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
QUESTION = re.compile(rf"\b{NAME}\s+is(\s+not)?\s+defined\b")


def writes_date(template: str) -> bool:
    """Whether a chat template writes the date on which it is rendered."""
    return re.search(rf"\b{NAME}\s*\(", template) is not None


def folder_writes_date(folder: Path) -> bool:
    """Whether files of a tokenizer hold a template that writes the date. Loads no tokenizer."""
    files = (folder / name for name in TEMPLATE_FILES)
    return any(writes_date(file.read_text(errors="replace")) for file in files if file.is_file())


def with_date(template: str, day: str) -> str:
    """`template` with `day` (YYYY-MM-DD) in place of today's date, at midnight. Raises ConfigError if it asks
    for the date otherwise than by formats that it spells out."""
    fixed = CALL.sub(lambda call: _written(call["format"], date.fromisoformat(day)), template)
    if NAME in (rest := QUESTION.sub("", fixed)):
        place = rest.index(NAME)
        raise ConfigError(
            f"the chat template calls {NAME} with something else than one plain text "
            f"({rest[place : place + 40]!a}), so that its date cannot be fixed: write one into the template"
        )
    return fixed


def _written(quoted: str, day: date) -> str:
    """A literal of jinja with the date in the format of another one."""
    quote = quoted[0]
    return f"{quote}{day.strftime(quoted[1:-1])}{quote}"
