"""One demo task, one warm-started model and one finished run, made by the commands that a user types."""

import itertools
from pathlib import Path

import pytest

from tests.e2e.workplace import REPOSITORY, Workplace, succeed

WARM = """
extends: {examples}/cpu_warm_start.yaml
sft: {{steps: 30}}
evaluation: {{prompts: 16}}
"""

TINY = """
extends: {examples}/cpu_troll.yaml
name: finished
rollout: {{prompts: 8, samples: 4}}
reward: {{name: "tests.e2e.rewards:Overlap"}}
train: {{steps: 4, updates: 2}}
evaluation: {{every: 2, prompts: 16}}
checkpoint: {{every: 1}}
"""

EVAL = """
extends: tiny.yaml
name: evaluated
models: {{policy: {{path: runs/finished/hf}}}}
eval:
  as_trained:
    files: [runs/demo/data/held_out.jsonl]
    schema: messages
    max_prompt_tokens: 32
    prompts: 16
    sampling: {{max_tokens: 8}}
  often:
    files: [runs/demo/data/train.jsonl, runs/demo/data/held_out.jsonl]
    max_prompt_tokens: 32
    prompts: 20
    samples: 6
    pass_at: [1, 2, 6]
    sampling: {{max_tokens: 6, temperature: 0.9, top_p: 0.95, stop: ["9"]}}
    reward: {{name: exact}}
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The demo task, cut to a few prompts; warm.yaml and tiny.yaml, the two trainings of these tests, and
    eval.yaml, which evaluates what tiny.yaml exports."""
    place = Workplace(tmp_path_factory.mktemp("e2e"))
    # A file of the working folder does not stand in for the standard library, in the command or its ranks.
    (place.root / "secrets.py").write_text("raise ImportError('the working folder is on the path')\n")
    succeed(place.mtroll("demo", "runs/demo"))
    for name, lines in (("train", 64), ("held_out", 64), ("warm", 1000)):
        _cut(place.run("demo") / "data" / f"{name}.jsonl", lines)
    for name, text in (("warm.yaml", WARM), ("tiny.yaml", TINY), ("eval.yaml", EVAL)):
        (place.root / name).write_text(text.format(examples=REPOSITORY / "examples" / "configs"))
    return place


@pytest.fixture(scope="session")
def warm(demo: Workplace) -> Workplace:
    """The demo's model after a short warm start, in runs/demo-warm-start/hf."""
    succeed(demo.mtroll("sft", "warm.yaml"))
    return demo


@pytest.fixture(scope="session")
def finished(warm: Workplace) -> Workplace:
    """A finished RL run of four steps on two ranks, in runs/finished."""
    succeed(warm.mtroll("train", "tiny.yaml"))
    return warm


def _cut(path: Path, lines: int) -> None:
    with open(path) as file:
        kept = list(itertools.islice(file, lines))
    path.write_text("".join(kept))
