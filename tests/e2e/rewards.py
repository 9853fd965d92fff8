"""Rewards that the end-to-end tests name by import path, as a user's own would be."""

import os
import resource
import time
import zlib
from pathlib import Path

from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt


class Overlap(Reward):
    """The share of places where answer and text agree: a model that has learned little earns something.
    Waits while a file `hold` exists, so that a test decides how far a run gets."""

    cheap = True

    def __call__(self, text: str, prompt: Prompt) -> float:
        while Path("hold").exists():
            time.sleep(0.02)
        return sum(a == b for a, b in zip(text, prompt.answer)) / len(prompt.answer)


class Starts(Reward):
    """1 where the first digit is right: many prompts whose samples all earn the same."""

    cheap = True

    def __call__(self, text: str, prompt: Prompt) -> float:
        return float(text[:1] == prompt.answer[:1])


class Checksum(Reward):
    """Another number for another text: answers of a model that can do nothing earn different rewards."""

    cheap = True

    def __call__(self, text: str, prompt: Prompt) -> float:
        return zlib.crc32(text.encode()) / 2**32


class Broken(Overlap):
    """Raises on some answers."""

    def __call__(self, text: str, prompt: Prompt) -> float:
        if prompt.answer[:1] in "02468":
            raise RuntimeError("the verifier has a bug")
        return super().__call__(text, prompt)


class Sleepy(Overlap):
    """Never returns on rank 1."""

    def __call__(self, text: str, prompt: Prompt) -> float:
        if os.environ["RANK"] == "1":
            time.sleep(600)
        return super().__call__(text, prompt)


class InTheWay(Overlap):
    """Puts a file in the place of the folder of rollouts once a step is trained on."""

    def __call__(self, text: str, prompt: Prompt) -> float:
        folder = Path("runs/in-the-way/rollouts")
        if folder.is_dir() and any(folder.iterdir()) and not Path("moved").exists():
            folder.rename("moved")
            folder.touch()
        return super().__call__(text, prompt)


class FullDisk(Overlap):
    """While a file `full` exists: once the second step of the run is saved, no rank makes a file longer than
    its metrics are then."""

    def __call__(self, text: str, prompt: Prompt) -> float:
        run = Path("runs/full")
        if Path("full").exists() and (run / "checkpoints" / "step_000002").exists():
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size, hard))
        return super().__call__(text, prompt)
