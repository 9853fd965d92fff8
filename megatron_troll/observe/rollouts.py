"""Rollouts of a run on disk: prompt, answer, reward, and the log-prob of each token."""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.system import write_atomic
from megatron_troll.types import Rollout

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
        self._suffix = f"{part}-of-{parts}.jsonl.gz"

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
            mask=[int(value > 0) for value in rollout.mask],
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
    """The samples of one step, from every rank's file. Raises RunFolderError if there are none."""
    paths = sorted(RunFolder(root).rollouts.glob(f"step_{step:06d}.*.jsonl.gz"))
    if not paths:
        steps = stored_steps(root)
        raise RunFolderError(
            f"{root} holds no rollouts of step {step}; it has steps {steps[0]} to {steps[-1]}."
        )
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield Sample(**json.loads(line))


def step_of(path: Path) -> int | None:
    """Step number in the name of a file of rollouts: 12 for `step_000012.0-of-4.jsonl.gz`; None for another
    name, which a run does not write."""
    named = NAME.fullmatch(path.name)
    return int(named.group(1)) if named else None
