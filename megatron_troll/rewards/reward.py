"""The interface of a verifier, and how one is built from the configuration."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from megatron_troll.config import ConfigError, Node, RewardConfig, build_method
from megatron_troll.types import Prompt

Wanted = Literal["reward", "vote"]


class Reward(Node):
    """A verifier; its fields are the keys that a configuration may set next to `reward.name`.

    It receives the text (no special tokens) and the prompt with its record, and returns a finite float.
    `cheap = True` runs it in the trainer's process, where no time limit is enforced.
    """

    cheap: ClassVar[bool] = False

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

    def put_to(self, verifier: Reward) -> object:
        if self.wanted == "reward":
            return verifier(self.text, self.prompt)
        assert isinstance(verifier, Votes)
        return verifier.vote(self.text)


def build(config: RewardConfig) -> Reward:
    """Build the verifier that `config` names, from a file in verifiers/ or `package.module:Class`, with its
    fields. Raises ConfigError for an unknown verifier or field (it suggests the nearest) or a wrong value."""
    reward = build_method(config, "megatron_troll.rewards.verifiers", Reward, "reward")
    taken = sorted(type(reward).model_fields.keys() & RewardConfig.model_fields.keys())
    if taken:
        raise ConfigError(f"reward.name: {config.name} declares fields that every reward has: {taken}")
    return reward


def resolve(config: RewardConfig) -> RewardConfig:
    """`config` with the defaults of its verifier's own fields filled in. Raises ConfigError like `build`."""
    return RewardConfig.model_validate(config.model_dump() | build(config).model_dump(mode="json"))
