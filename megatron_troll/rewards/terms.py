"""A reward as the weighted sum of its parts: `{name: sum, parts: {NAME: {name: VERIFIER, weight: 1}, ...}}`.

Each part is a verifier with fields, weight, time limit and handling of reasoning of its own. Any other reward
is a sum of one part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from megatron_troll.config import (
    ConfigError,
    MetricWord,
    Node,
    Origin,
    Overlong,
    RewardConfig,
    Seconds,
    Slot,
    nearest,
)
from megatron_troll.config.validate import read_fields
from megatron_troll.rewards.length import NAME as LENGTH
from megatron_troll.rewards.reward import Reward, build, problem
from megatron_troll.types import Prompt

SUM, GYM = "sum", "gym"


class PartConfig(Slot):
    """One part of a sum: a verifier by name or import path, its own fields beside it."""

    weight: float = Field(default=1.0, description="factor of its reward in the sum; 0: it is only logged")
    timeout_s: Seconds | None = Field(default=None, description="default: that of the sum")
    reasoning: Literal["drop", "keep"] | None = Field(default=None, description="default: that of the sum")


class Sum(Node):
    """Several verifiers judge every answer; its reward is the sum of weight times theirs."""

    parts: dict[MetricWord, PartConfig] = Field(
        min_length=1, description="verifiers by name; `reward/NAME` is logged"
    )
    success: MetricWord | None = Field(
        default=None, description="part that is the success of an answer; default: the only or first one"
    )


@dataclass(frozen=True)
class Term:
    """One part. name: "" for a reward that is no sum; succeeds: whether it is the success of an answer."""

    name: str
    weight: float
    succeeds: bool
    config: RewardConfig


def terms(config: RewardConfig, key: str = "reward") -> tuple[Term, ...]:
    """The parts of a reward; `key` is its place in the configuration. Raises ConfigError for a sum that makes
    no sense."""
    if config.name != SUM:
        return (Term("", 1.0, True, config),)
    read = read_fields(config, Sum, key)
    success = read.success or next(iter(read.parts))
    if success not in read.parts:
        raise ConfigError(f"{key}.success: no part {success!r}; {nearest(success, read.parts)}")
    if not any(part.weight for part in read.parts.values()):
        raise ConfigError(f"{key}.parts: every weight is 0, so every answer would earn 0")
    if config.overlong.soft is not None and LENGTH in read.parts:
        raise ConfigError(
            f"{key}.parts.{LENGTH}: {key}.overlong.soft is logged under this name; choose another"
        )
    for name, part in read.parts.items():
        if part.name == SUM:
            raise ConfigError(f"{key}.parts.{name}.name: a part is no sum itself: name its parts here")
    return tuple(
        Term(name, part.weight, name == success, _of_part(config, part)) for name, part in read.parts.items()
    )


def _of_part(config: RewardConfig, part: PartConfig) -> RewardConfig:
    """The config of a part. What a cut answer earns in place of the sum is no matter of its parts."""
    common = {
        "timeout_s": part.timeout_s or config.timeout_s,
        "reasoning": part.reasoning or config.reasoning,
        "overlong": Overlong(mode=config.overlong.mode),
    }
    return RewardConfig.model_validate(part.fields | {"name": part.name} | common)


def resolve(config: RewardConfig, key: str = "reward") -> RewardConfig:
    """`config` with the defaults of the own fields of its verifiers filled in. Raises ConfigError for an
    unknown verifier or field, or a wrong value."""
    found = {term.name: _built(term, place(key, term)).model_dump(mode="json") for term in terms(config, key)}
    if config.name != SUM:
        return RewardConfig.model_validate(config.model_dump() | found[""])
    read = read_fields(config, Sum, key)
    parts = {name: part.model_dump() | found[name] for name, part in read.parts.items()}
    success = next(term.name for term in terms(config) if term.succeeds)
    return RewardConfig.model_validate(config.model_dump() | {"parts": parts, "success": success})


def _built(term: Term, key: str) -> Reward:
    verifier = build(term.config, key)
    if term.name and "weight" in type(verifier).model_fields:
        raise ConfigError(f"{key}.name: {term.config.name} declares the field weight, which every part has")
    return verifier


def place(key: str, term: Term) -> str:
    """The place of a part in the configuration."""
    return f"{key}.parts.{term.name}" if term.name else key


def default(config: RewardConfig, origin: Origin) -> RewardConfig:
    """The reward of a source that names none: `config`, but for tasks of reasoning-gym their own scorer, with
    the limits and the handling of reasoning and of cut answers of `config`, unless that asks it already."""
    if origin.gym is None or asks_scorer(config):
        return config
    common: dict[str, Any] = {key: getattr(config, key) for key in RewardConfig.model_fields}
    return RewardConfig.model_validate(common | {"name": GYM})


def asks_scorer(config: RewardConfig) -> bool:
    """Whether the scorer of a task judges, alone or as a part."""
    return any(term.config.name == GYM for term in terms(config))


def names(configs: Sequence[RewardConfig]) -> list[str]:
    """The names of all verifiers of several rewards."""
    return sorted({term.config.name for config in configs for term in terms(config)})


class Judges:
    """The verifiers of a reward, which say why no answer to a prompt can be judged."""

    def __init__(self, config: RewardConfig) -> None:
        self.verifiers: list[Reward] = [build(term.config) for term in terms(config)]

    def problem(self, prompt: Prompt) -> str | None:
        """Return the reason of the first verifier that has one, None if there is none."""
        found = (problem(verifier, prompt) for verifier in self.verifiers)
        return next((one for one in found if one is not None), None)

    @property
    def packages(self) -> set[str]:
        """Packages whose release may change a verdict."""
        return {package for verifier in self.verifiers for package in verifier.packages}
