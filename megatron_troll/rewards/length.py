"""Soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13): rewards fall with the length of answers."""

from dataclasses import dataclass

from megatron_troll.config import ConfigError, RewardConfig

NAME = "overlong"


@dataclass(frozen=True)
class LengthPenalty:
    """Loss of reward by the length of an answer.

    longest  L_max, tokens
    cache    L_cache, tokens, at most `longest`
    weight   factor of the penalty in the reward
    """

    longest: int
    cache: int
    weight: float

    def of(self, length: int) -> float:
        """Return 0 up to longest - cache tokens, then a line that falls to -1 at `longest`, and -1 beyond."""
        return max(-1.0, min(0.0, (self.longest - self.cache - length) / self.cache))


def length_penalty(config: RewardConfig, limit: int, key: str = "reward") -> LengthPenalty | None:
    """The penalty that a reward asks for, None if it asks for none. limit: the longest answer that is
    sampled, in tokens; key: the reward's place in the configuration. Raises ConfigError."""
    soft = config.overlong.soft
    if soft is None:
        return None
    longest = soft.longest or limit
    if soft.cache > longest:
        named = "longest" if soft.longest else "rollout.sampling.max_tokens"
        raise ConfigError(
            f"{key}.overlong.soft.cache={soft.cache} is more than {named}={longest}: the penalty grows over "
            "the last `cache` tokens before it"
        )
    return LengthPenalty(longest, soft.cache, soft.weight)
