"""What a verifier is, and how the configuration leads to one."""

from abc import abstractmethod
from typing import ClassVar

from megatron_troll.config import ConfigError
from megatron_troll.config.methods import build_method
from megatron_troll.config.tree import Node, RewardConfig
from megatron_troll.types import Prompt


class Reward(Node):
    """A verifier; its fields are those that a configuration may set beside `reward.name`.

    It sees the text (no special tokens) and the prompt with its record, and returns a finite float.
    `cheap = True` runs it in the trainer's process, where no time limit is enforced.
    """

    cheap: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, text: str, prompt: Prompt) -> float: ...


def build(config: RewardConfig) -> Reward:
    """The verifier of a file in verifiers/ or of `package.module:Class`, with its fields. Raises ConfigError
    for an unknown verifier or field (the nearest known one is named) or a wrong value."""
    reward = build_method(config, "megatron_troll.rewards.verifiers", Reward, "reward")
    taken = sorted(type(reward).model_fields.keys() & RewardConfig.model_fields.keys())
    if taken:
        raise ConfigError(f"reward.name: {config.name} declares fields that every reward has: {taken}")
    return reward


def resolve(config: RewardConfig) -> RewardConfig:
    """`config` with the defaults of its verifier's own fields filled in. Raises ConfigError like `build`."""
    return RewardConfig.model_validate(config.model_dump() | build(config).model_dump(mode="json"))
