"""Demonstrations of a form, the name alone, from a model's own answers, right or wrong as they came.

    mtroll eval examples/configs/lm_answers.yaml
    python tools/lm_demonstrations.py runs/lm-answers runs/lm/demonstrations.jsonl

Reads the rollouts of `mtroll eval`, never the right answers: training on what this writes teaches the form,
and to be right no more often than the model was.
"""

import argparse
import json
import re
from pathlib import Path

from megatron_troll.observe.rollouts import Sample, read_step, stored_steps
from megatron_troll.system import write_atomic

# Every statement of needle_haystack begins with a name.
NAME = re.compile(r"(?:^|\. )([A-Z]\S*)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="folder of an evaluation")
    parser.add_argument("target", type=Path, help="JSON lines for mtroll sft")
    arguments = parser.parse_args()
    samples = [sample for step in stored_steps(arguments.run) for sample in read_step(arguments.run, step)]
    lines = [line for sample in samples if (line := demonstration(sample)) is not None]
    write_atomic(arguments.target, "".join(lines).encode())
    print(f"{len(lines)} demonstrations of {len(samples)} answers: {arguments.target}")


def demonstration(sample: Sample) -> str | None:
    """A chat of the question and the name of it that the answer mentions first; None if it mentions none."""
    question = sample.question.removeprefix("user: ")
    found = {name: sample.text.find(name) for name in NAME.findall(question) if name in sample.text}
    if not found:
        return None
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": min(found, key=found.__getitem__)},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
