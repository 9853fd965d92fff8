"""Verifiers that live outside the package, good and bad, named by import path in the tests."""

import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

from megatron_troll.rewards.reward import MachineError, Reward
from megatron_troll.rewards.verifiers.code import Code


class Length(Reward):
    """Shorter is better; the prompt's record may set the limit."""

    longest: int = 4

    def __call__(self, text, prompt):
        return float(len(text) <= prompt.record.get("longest", self.longest))


class Obeys(Reward):
    """Does what the answer says."""

    def __call__(self, text, prompt):
        if text == "hang":
            threading.Event().wait()
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("die once "):
            _die_once(Path(text.removeprefix("die once ")))
        if text == "end":
            os._exit(0)
        if text == "recurse":
            return self(text, prompt)
        errors = {
            "raise": RuntimeError("the verifier has a bug"),
            "no memory": MemoryError(),
            "leave": SystemExit(3),
            "file": FileNotFoundError(2, "No such file"),
            "machine": MachineError("no space left"),
        }
        if text in errors:
            raise errors[text]
        return {"nan": float("nan"), "int": 1, "none": None, "lock": threading.Lock()}.get(text, 1.0)


class ObeysHere(Obeys):
    """The same in the trainer's process."""

    cheap: ClassVar[bool] = True


class LosesItsFolder(Code):
    """Answers cost the machine the folder for temporary files."""

    def __call__(self, text, prompt):
        tempfile.tempdir = "/no/such/folder"
        return super().__call__(text, prompt)


def _die_once(marker: Path) -> None:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class NamesItsProcess(Reward):
    def __call__(self, text, prompt):
        time.sleep(0.3)
        return float(os.getpid())


class DiesWhenBuilt(Reward):
    trainer: int

    def model_post_init(self, context):
        if os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, text, prompt):
        return 1.0


class Checks(Reward):
    def check(self, prompt):
        prompt.record["needed"]

    def __call__(self, text, prompt):
        return 1.0


class TakenField(Reward):
    timeout_s: float = 1.0

    def __call__(self, text, prompt):
        return 1.0


class NotAReward:
    def __call__(self, text, prompt):
        return 1.0


class VotesANumber(Obeys):
    def vote(self, text: str) -> int | None:
        return len(text) or None
