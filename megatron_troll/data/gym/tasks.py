"""The tasks of a run's sources of reasoning-gym, made in a process of their own before anything else."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_troll.config import ConfigError, Gym
from megatron_troll.data.gym.make import Job
from megatron_troll.data.gym.refused import RELEASE
from megatron_troll.data.rows import DataError, Row
from megatron_troll.types import Message, Prompt

PACKAGE = "reasoning-gym"
ASKED = "Write your final answer between <answer> and </answer>, and nothing but the answer there."
# Fields of the metadata in which sets that have no answer of their own give an example of a right one.
EXAMPLES = ("example_correct_answer", "example_answer")
LAST_LINES = 5


@dataclass(frozen=True)
class Wanted:
    """Tasks that a source needs. key: the place of `gym` in the configuration; train: whether it is trained
    on; held_out: the number of distinct questions that are no training items."""

    key: str
    gym: Gym
    train: bool
    held_out: int

    @property
    def jobs(self) -> list[Job]:
        train = [self._job(False, self.gym.size)] if self.train else []
        return train + ([self._job(True, self.held_out)] if self.held_out else [])

    def _job(self, held_out: bool, count: int) -> Job:
        gym, rising = self.gym, self.gym.curriculum
        levels = None if rising is None else (rising.first, rising.last)
        return Job(self.key, gym.name, dict(gym.fields), gym.seed, count, held_out, levels)


@dataclass(frozen=True)
class Tasks:
    """The rows of one source, those to train on of each level; `to_prompt` reads them."""

    train: list[list[Row]]
    held_out: list[Row]
    to_prompt: Callable[[Row], Prompt]


def make(wanted: Mapping[str, Wanted]) -> dict[str, Tasks]:
    """The tasks of each source, the same in every process. Blocks: a set takes from .1 ms to a second an
    item. Raises ConfigError for a set that cannot be made or trusted, which names the key, and if the library
    is not there; DataError if the process that makes them fails."""
    jobs = [job for one in wanted.values() for job in one.jobs]
    rows = iter(_run(jobs) if jobs else [])
    return {
        name: Tasks(
            train=next(rows) if one.train else [],
            held_out=next(rows)[0] if one.held_out else [],
            to_prompt=_reader(one.gym),
        )
        for name, one in wanted.items()
    }


def _run(jobs: Sequence[Job]) -> list[list[list[Row]]]:
    _check_release(jobs[0].key)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "megatron_troll.data.gym.make"],
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
        raise DataError(
            f"{jobs[0].key}: the process that makes the tasks ended with exit code {done.returncode}:\n{said}"
        )
    return [_parts(job, json.loads(line)) for job, line in zip(jobs, done.stdout.splitlines(), strict=True)]


def _parts(job: Job, answer: Mapping[str, Any]) -> list[list[Row]]:
    """The rows of each level."""
    if "problem" in answer:
        key = ".".join(filter(None, (job.key, answer["option"])))
        raise ConfigError(f"{key}: {answer['problem']}")
    return [[_row(job, part["level"], row) for row in part["rows"]] for part in answer["parts"]]


def _row(job: Job, level: int | None, row: Mapping[str, Any]) -> Row:
    kind, part = ("held-out item", "held-out-") if job.held_out else ("item", "")
    at, before = ("", "") if level is None else (f" level {level}", f"{level}-")
    return Row(
        f"{job.key} ({job.name}){at} {kind} {row['index']}",
        {"id": f"{part}{before}{row['index']}", "level": level, "entry": row["entry"]},
        row["problem"],
    )


def _reader(gym: Gym) -> Callable[[Row], Prompt]:
    """The prompt of a row. Its record holds the item, in the forms of encoding.py, and what its scorer is
    made with."""

    def to_prompt(row: Row) -> Prompt:
        entry, level = row.value["entry"], row.value["level"]
        examples = [entry["metadata"].get(name) for name in EXAMPLES]
        answer = next((one for one in (entry["answer"], *examples) if isinstance(one, str)), "")
        made = {"set": gym.name, "options": dict(gym.fields)} | ({} if level is None else {"level": level})
        return Prompt(row.value["id"], (Message("user", entry["question"]),), answer, {"gym": made, **entry})

    return to_prompt


def _check_release(key: str) -> None:
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        raise ConfigError(f"{key}: {PACKAGE} is not installed: install megatron-troll[gym]") from None
    if found != RELEASE:
        raise ConfigError(
            f"{key}: {PACKAGE} {found} is installed; whether scorers can be trusted is known of {RELEASE} "
            "alone: install megatron-troll[gym]"
        )
