"""The keys of a config.json, each checked when it is read."""

from dataclasses import dataclass
from typing import Any

from megatron_troll.config import ConfigError

# Every layer and expert is an entry of a table.
LARGEST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Fields:
    """The content of a config.json. Each method raises ConfigError that names the file (`where`) and the key.
    Without a `default`, a key must be there."""

    config: dict[str, Any]
    where: str

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._value(key, default)
        if not (type(value) is int and value > 0):
            raise self.error(f"{key} {value!r} must be a whole number above 0")
        most = LARGEST.get(key, LARGEST_SIZE)
        if value > most:
            raise self.error(f"{key} {str(value)[:40]} is above {most}: is it a typo?")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._value(key, default)
        if not positive(value):
            raise self.error(f"{key} {value!r} must be a number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if type(value) is not bool:
            raise self.error(f"{key} {value!r} must be true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Check that a key has one of the `allowed` values, or is absent."""
        if key in self.config and self.config[key] not in allowed:
            raise self.error(f"{key}: {self.config[key]!r} is not supported (only {allowed[0]!r})")

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; {} for null or an absent key."""
        value = self.config.get(key)
        if not isinstance(value, dict | None):
            raise self.error(f"{key} {str(value)[:40]!a} must be an object or null")
        return value or {}

    def _value(self, key: str, default: Any) -> Any:
        if default is None and key not in self.config:
            raise self.error(f"{key!r} is missing")
        return self.config.get(key, default)


def positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")
