"""Methods that the end-to-end tests name by import path, as a user's own would be."""

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_troll.config.tree import Sampling
from megatron_troll.objectives.slots import Policy, Term
from megatron_troll.objectives.trust_region.clip import Clip
from megatron_troll.rewards.reward import Reward
from megatron_troll.rollout.engine import Request
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.types import ObjectiveInputs, Prompt, Rollout

MARK = -1e4


class Overlap(Reward):
    """The share of places where answer and text agree: a model that has learned little earns something.
    Waits while a file `hold` exists, so that a test decides how far a run gets."""

    cheap = True

    def __call__(self, text: str, prompt: Prompt) -> float:
        while Path("hold").exists():
            time.sleep(0.02)
        return sum(a == b for a, b in zip(text, prompt.answer)) / len(prompt.answer)


class Sleepy(Overlap):
    """Never returns on rank 1."""

    def __call__(self, text: str, prompt: Prompt) -> float:
        if os.environ["RANK"] == "1":
            time.sleep(600)
        return super().__call__(text, prompt)


class Unreliable(InProcessEngine):
    """Loses the log-prob of one token in round 1, and from round 3 on marks one token for `Brittle`."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        rollouts = super().generate(requests, sampling, round)
        if round == 1:
            rollouts[5] = with_logp(rollouts[5], float("nan"))
        if round >= 3:
            rollouts[2] = with_logp(rollouts[2], MARK)
        return rollouts


class Brittle(Clip):
    """Gives NaN for a marked token."""

    def surrogate(self, ratio: torch.Tensor, policy: Policy, inputs: ObjectiveInputs) -> Term:
        term = super().surrogate(ratio, policy, inputs)
        return replace(term, value=torch.where(inputs.rollout_logp == MARK, torch.nan, term.value))


def with_logp(rollout: Rollout, value: float) -> Rollout:
    """`rollout` whose first token has the log-prob `value`."""
    logp = rollout.logp.copy()
    logp[0] = value
    return replace(rollout, logp=logp)
