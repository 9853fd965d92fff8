"""YAML in which every value keeps the place it was written at. Scalars follow YAML 1.2: 1e-6 is a float."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_troll.config.node import ConfigError

Scalar = str | int | float | bool | None
DIGITS = list("-+.0123456789")


@dataclass(frozen=True)
class YamlValue:
    """A value and its place, as errors name it ("run.yaml line 3")."""

    value: "Scalar | list[YamlValue] | dict[str, YamlValue]"
    place: str

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def child(self, key: str | int) -> "YamlValue | None":
        if isinstance(self.value, dict):
            return self.value.get(str(key))
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _resolve(kind: str, pattern: str, first: list[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)


_resolve("null", "~|null|Null|NULL|", ["~", "n", "N", ""])
_resolve("bool", "true|True|TRUE|false|False|FALSE", list("tTfF"))
_resolve("int", "[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", DIGITS)
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    DIGITS,
)


def parse(text: str | bytes, name: str) -> YamlValue:
    """Parse a YAML document. Raises ConfigError with `name` and the line on bad syntax or a repeated key."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return YamlValue({}, name) if node is None else _entry(loader, node, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = name if mark is None else f"{name} line {mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {reason}") from error


def render(tree: dict[str, Any]) -> str:
    """Render YAML that `parse` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _entry(loader: _Loader, node: yaml.Node, name: str, place: str | None = None) -> YamlValue:
    place = place or f"{name} line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        return YamlValue(_mapping(loader, node, name), place)
    if isinstance(node, yaml.SequenceNode):
        return YamlValue([_entry(loader, item, name) for item in node.value], place)
    value = loader.construct_object(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"{place}: a value of the YAML type {node.tag} cannot be used here")
    return YamlValue(value, place)


def _mapping(loader: _Loader, node: yaml.MappingNode, name: str) -> dict[str, YamlValue]:
    entries: dict[str, YamlValue] = {}
    for key, value in node.value:
        place = f"{name} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        if key.value in entries:
            raise ConfigError(f"{place}: {key.value!r} is given twice (first in {entries[key.value].place})")
        entries[key.value] = _entry(loader, value, name, place)
    return entries
