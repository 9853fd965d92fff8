"""The interface of a verifier, and how one is built from the configuration."""

import math
import traceback
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from megatron_troll.config import ConfigError, Node, RewardConfig, build_method
from megatron_troll.types import Prompt

Wanted = Literal["reward", "vote"]
Value = float | str | None


class MachineError(RuntimeError):
    """The machine failed a verifier (no space, no process), whatever the answer is; the message says how."""


class Reward(Node):
    """A verifier; its fields are the keys that a configuration may set next to `reward.name`.

    It receives the text (no special tokens) and the prompt with its record, and returns a finite float.
    `cheap = True` runs it in the trainer's process, where no time limit is enforced. `packages` names the
    distributions whose release may change a verdict: a run that continues with another one is told.
    """

    cheap: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, text: str, prompt: Prompt) -> float: ...

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError, which says why, if no answer to `prompt` can be judged: its record is malformed.
        Called for every prompt when its file is read."""


@runtime_checkable
class Votes(Protocol):
    """A verifier that extracts an answer, for majority votes (maj@k)."""

    def vote(self, text: str) -> str | None:
        """The answer of `text` in a normal form: texts with equal normal forms have the same vote. None: the
        text gives no answer."""
        ...


@dataclass(frozen=True)
class VerifierCall:
    """One call of a verifier for one text, which returns its reward or its vote."""

    text: str
    prompt: Prompt
    wanted: Wanted

    def put_to(self, verifier: Reward) -> Value:
        """The verifier's value. Raises whatever it raises, and TypeError or ValueError for another value."""
        if self.wanted == "reward":
            return _finite(verifier(self.text, self.prompt))
        assert isinstance(verifier, Votes)
        return _text(verifier.vote(self.text))


@dataclass(frozen=True)
class Raised:
    """Stands for a value: the verifier raised an exception, described in one line."""

    what: str


def attempt(call: VerifierCall, verifier: Reward) -> Value | Raised:
    """The value of one call, or Raised: whatever a verifier raises on one answer costs only that answer,
    except MachineError, which is passed on."""
    try:
        return call.put_to(verifier)
    except MachineError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the border of plug-ins; counted and shown)
        return Raised(_summary(error))


def problem(verifier: Reward, prompt: Prompt) -> str | None:
    """Return why no answer to `prompt` can be judged; None if its record is as the verifier needs it."""
    try:
        verifier.check(prompt)
    except ValueError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (the border of plug-ins; the row is named)
        return _summary(error)
    return None


def _finite(value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"the reward is {value!r:.80}, expected a finite float")
    return float(value)


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"the vote is {value!r:.80}, expected text")
    return value if value is None else str(value)


def _summary(error: BaseException) -> str:
    """One line: the type and message of an exception, and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    at = f" ({frames[-1].filename} line {frames[-1].lineno})" if frames else ""
    told = "".join(str(error).splitlines()[:1])
    return f"{type(error).__name__}: {told:.200}{at}"


def build(config: RewardConfig, key: str = "reward") -> Reward:
    """Build the verifier that `config` names, from a file in verifiers/ or `package.module:Class`, with its
    fields; `key` is its place in the configuration. Raises ConfigError for an unknown verifier or field (it
    suggests the nearest) or a wrong value."""
    reward = build_method(config, "megatron_troll.rewards.verifiers", Reward, key)
    taken = sorted(type(reward).model_fields.keys() & RewardConfig.model_fields.keys())
    if taken:
        raise ConfigError(f"{key}.name: {config.name} declares fields that every reward has: {taken}")
    return reward
