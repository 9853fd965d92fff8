"""The demo's tokenizer in a folder: each turn is a role token, the text, and <|end|>."""

import json
from pathlib import Path

import pytest

from megatron_troll.data.demo_model import write_base
from megatron_troll.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    write_base(folder)
    return folder


@pytest.fixture
def tokenizer(base_folder):
    return load_tokenizer(base_folder)


@pytest.fixture
def write_jsonl(tmp_path):
    """Write records (or raw lines) to a file and give its path."""

    def write(name: str, *records) -> str:
        path = tmp_path / name
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write
