"""The demo task: `sort 73915` -> `13579`, with demonstrations that show one bad habit.

Three quarters of the demonstrations stop early and leave the last two digits swapped, so more supervised
training cannot solve the task: RL has to select the right behaviour among those in the demonstrations.
Several independent demonstrations of each prompt keep the sampling entropy high.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_troll.data.demo_model import write_base, write_hybrid, write_small

DIGITS = 5
WARM, DEMONSTRATIONS, TRAIN, HELD_OUT = 2_000, 4, 8_000, 1_024
HABIT = 0.75
HELD_OUT_ANSWERS = 0.2


def write_demo(folder: str | Path, seed: int) -> None:
    """Write data/{warm,train,held_out}.jsonl and the untrained models base/, small/ and hybrid/ under
    `folder`. The same seed writes the same bytes.

    The split is by answer (the sorted digits): no held-out answer occurs in training.
    """
    folder = Path(folder)
    warm, train, held_out = _split_prompts(random.Random(f"prompts {seed}"))
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    _write_lines(data / "warm.jsonl", _demonstrations(warm, random.Random(f"habit {seed}")))
    _write_lines(data / "train.jsonl", map(_prompt, train))
    _write_lines(data / "held_out.jsonl", map(_prompt, held_out))
    write_base(folder / "base")
    write_small(folder / "small")
    write_hybrid(folder / "hybrid")


def _split_prompts(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Distinct digit strings for the warm start, RL and evaluation."""
    prompts = [f"{number:0{DIGITS}}" for number in range(10**DIGITS)]
    answers = sorted({_answer(digits) for digits in prompts})
    held_answers = set(rng.sample(answers, int(HELD_OUT_ANSWERS * len(answers))))
    rng.shuffle(prompts)
    held_out = [digits for digits in prompts if _answer(digits) in held_answers]
    rest = [digits for digits in prompts if _answer(digits) not in held_answers]
    return rest[:WARM], rest[WARM : WARM + TRAIN], held_out[:HELD_OUT]


def _answer(digits: str) -> str:
    return "".join(sorted(digits))


def _demonstrations(prompts: list[str], rng: random.Random) -> Iterable[dict[str, Any]]:
    for digits in prompts:
        for number in range(DEMONSTRATIONS):
            shown = _answer(digits)
            if rng.random() < HABIT:
                shown = shown[:-2] + shown[-1] + shown[-2]
            turns = [*_question(digits), {"role": "assistant", "content": shown}]
            yield {"id": f"sort-{digits}-{number}", "messages": turns}


def _prompt(digits: str) -> dict[str, Any]:
    return {"id": f"sort-{digits}", "messages": _question(digits), "answer": _answer(digits)}


def _question(digits: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"sort {digits}"}]


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
