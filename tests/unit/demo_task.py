"""A configuration on the demo's untrained model (conftest.base) and ten prompts."""

import json
from pathlib import Path


def write_config(template: str, base: Path, folder: Path) -> Path:
    """`template` with {base} and {prompts} filled in, beside its prompts."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(line(number) for number in range(10)))
    path = folder / "run.yaml"
    path.write_text(template.format(base=base, prompts=prompts))
    return path


def line(number: int) -> str:
    turns = [{"role": "user", "content": f"sort {number}"}]
    return json.dumps({"id": str(number), "messages": turns, "answer": str(number)}) + "\n"
