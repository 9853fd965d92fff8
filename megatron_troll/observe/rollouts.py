"""Rollouts of a run on disk: prompt, answer, reward, and the log-prob of each token."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.system import write_atomic
from megatron_troll.types import Rollout

# What reading a damaged file of rollouts raises: gzip, zlib, UTF-8, JSON, a sample with other fields.
DAMAGE = (OSError, EOFError, zlib.error, ValueError, TypeError, RecursionError)
FIELDS: dict[str, Any] = {
    **dict.fromkeys(("step", "sample"), int),
    **dict.fromkeys(("reward", "advantage"), int | float),
    **dict.fromkeys(("tokens", "logp", "mask"), list),
}
SUFFIX = ".jsonl.gz"
NAME = re.compile(r"step_([0-9]{6,})\.[0-9]+-of-[0-9]+\.jsonl\.gz")


@dataclass(frozen=True)
class Sample:
    """One rollout as stored. tokens, logp and mask are aligned; logp in nats, to 4 decimals; mask is 1
    for tokens that the policy sampled and that carry loss."""

    step: int
    prompt: str
    sample: int
    question: str
    answer: str
    text: str
    reward: float
    advantage: float
    finish: str
    tokens: list[str]
    logp: list[float]
    mask: list[int]

    @property
    def mean_logp(self) -> float:
        kept = [value for value, keep in zip(self.logp, self.mask, strict=True) if keep]
        return sum(kept) / max(1, len(kept))


class RolloutStore:
    """Writes rollouts/step_NNNNNN.P-of-Q.jsonl.gz, one file per step and data-parallel rank P of Q.

    `decode` gives the text of one token id. A token costs about 8 bytes on disk, text and log-prob
    (measured on random words, the worst case), so 64 x 8 answers of 1,000 tokens are 4 MB per step.
    """

    def __init__(self, folder: Path, decode: Callable[[int], str], part: int = 0, parts: int = 1) -> None:
        self._folder = folder
        self._decode = decode
        self._suffix = f"{part}-of-{parts}{SUFFIX}"

    def write(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Sequence[float],
        advantages: Sequence[float],
    ) -> Path:
        """Store this rank's rollouts of `step`, in one file, written atomically; returns its path."""
        scored = zip(rollouts, rewards, advantages, strict=True)
        lines = [json.dumps(asdict(self._sample(step, *one)), ensure_ascii=False) for one in scored]
        path = self._folder / f"step_{step:06d}.{self._suffix}"
        write_atomic(path, gzip.compress("".join(line + "\n" for line in lines).encode(), mtime=0))
        return path

    def _sample(self, step: int, rollout: Rollout, reward: float, advantage: float) -> Sample:
        return Sample(
            step=step,
            prompt=rollout.prompt.id,
            sample=rollout.sample,
            question="\n".join(f"{m.role}: {m.content}" for m in rollout.prompt.messages),
            answer=rollout.prompt.answer,
            text=rollout.text,
            reward=round(float(reward), 6),
            advantage=round(float(advantage), 6),
            finish=rollout.finish,
            tokens=[self._decode(int(token)) for token in rollout.response_ids],
            logp=[round(float(value), 4) for value in rollout.logp],
            mask=[int(value) for value in rollout.mask],
        )


def stored_steps(root: Path) -> list[int]:
    """Steps of the run that have rollouts, ascending. Raises RunFolderError when there is none."""
    named = (step_of(path) for path in RunFolder(root).rollouts.glob("step_*.jsonl.gz"))
    steps = sorted({step for step in named if step is not None})
    if not steps:
        raise RunFolderError(
            f"{root} holds no rollouts in {RunFolder(root).rollouts}. "
            "They are written after each generation when observe.rollouts=true; check the path, or wait."
        )
    return steps


def read_step(root: Path, step: int) -> Iterator[Sample]:
    """The samples of one step, from every rank's file. Raises RunFolderError if one is missing."""
    folder = RunFolder(root).rollouts
    paths = sorted(path for path in folder.glob(f"step_{step:06d}.*") if NAME.fullmatch(path.name))
    if not paths:
        steps = stored_steps(root)
        raise RunFolderError(
            f"{root} holds no rollouts of step {step}; it has steps {steps[0]} to {steps[-1]}."
        )
    parts = paths[0].name.removesuffix(SUFFIX).rpartition("-of-")[2]
    for path in (folder / f"step_{step:06d}.{part}-of-{parts}{SUFFIX}" for part in range(int(parts))):
        if path not in paths:
            raise RunFolderError(f"{path} is missing, and {paths[0].name} is there")
        yield from _samples(path)


def _samples(path: Path) -> Iterator[Sample]:
    """The samples of a file. Raises RunFolderError if it is damaged."""
    whole = 0
    if not path.is_file():
        raise RunFolderError(f"{path}: not a file")
    try:
        if path.stat().st_size == 0:  # gzip reads an empty file as one without lines
            raise EOFError("it is empty")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                sample = Sample(**json.loads(line))
                _check(sample)
                whole += 1
                yield sample
    except DAMAGE as error:
        what = str(error) or type(error).__name__
        raise RunFolderError(f"{path}: damaged after line {whole}: {what:.200}") from error


def _check(sample: Sample) -> None:
    """Raise TypeError or ValueError for a sample that no store has written."""
    for one in fields(Sample):
        value, kind = getattr(sample, one.name), FIELDS.get(one.name, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{one.name} is {value!r:.60}")
    for name, kind in (("tokens", str), ("logp", int | float), ("mask", int)):
        if not all(isinstance(value, kind) for value in getattr(sample, name)):
            raise TypeError(f"{name} holds something else than {kind}")
    if not len(sample.tokens) == len(sample.logp) == len(sample.mask):
        raise ValueError("tokens, logp and mask differ in length")


def step_of(path: Path) -> int | None:
    """Step number in the name of a file of rollouts: 12 for `step_000012.0-of-4.jsonl.gz`; None for another
    name, which a run does not write."""
    named = NAME.fullmatch(path.name)
    return int(named.group(1)) if named else None
