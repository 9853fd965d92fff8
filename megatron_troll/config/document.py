"""YAML in which every value keeps the place it was written at. Scalars follow YAML 1.2: 1e-6 is a float."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_troll.config.node import ConfigError

Scalar = str | int | float | bool | None
DIGITS = list("-+.0123456789")
# Far beyond any configuration, and read within a second.
LARGEST_FILE, MOST_VALUES, DEEPEST = 2**18, 10_000, 50
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError)


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
    """Composes a document of at most MOST_VALUES values, DEEPEST levels deep; raises ConfigError beyond."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def __init__(self, text: str | bytes, name: str) -> None:
        super().__init__(text)
        self.document, self.depth, self.values = name, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        line = self.peek_event().start_mark.line + 1
        self.count(f"{self.document} line {line}")
        if self.depth > DEEPEST:
            raise ConfigError(f"{self.document} line {line}: more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def count(self, place: str) -> None:
        """Count one value. Raises ConfigError beyond MOST_VALUES, aliases written out."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise ConfigError(f"{place}: more than {MOST_VALUES:,} values, aliases written out")


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
    """Parse a YAML document. Raises ConfigError with `name` and the line on bad syntax, a repeated key, or a
    document larger than any configuration."""
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{name}: more than {LARGEST_FILE:,} bytes; no configuration is as large")
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        return YamlValue({}, name) if node is None else _entry(loader, node, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = name if mark is None else f"{name} line {mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: not valid YAML: {' '.join(reason.split())}") from error


def render(tree: dict[str, Any]) -> str:
    """Render YAML that `parse` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _entry(
    loader: _Loader, node: yaml.Node, name: str, place: str | None = None, above: tuple[yaml.Node, ...] = ()
) -> YamlValue:
    """The value of a node inside the nodes `above`, which an alias may not lead back to."""
    place = place or f"{name} line {node.start_mark.line + 1}"
    loader.count(place)
    if any(node is other for other in above):
        raise ConfigError(f"{place}: this value contains itself, through an alias")
    if len(above) > DEEPEST:
        raise ConfigError(f"{place}: more than {DEEPEST} levels deep")
    if isinstance(node, yaml.MappingNode):
        return YamlValue(_mapping(loader, node, name, (*above, node)), place)
    if isinstance(node, yaml.SequenceNode):
        return YamlValue([_entry(loader, item, name, None, (*above, node)) for item in node.value], place)
    return YamlValue(_scalar(loader, node, place), place)


def _scalar(loader: _Loader, node: yaml.Node, place: str) -> Scalar:
    try:
        value = loader.construct_object(node)
    except UNREADABLE as error:
        raise ConfigError(f"{place}: {node.value!r:.60} cannot be read as {node.tag}: {error}") from error
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(f"{place}: a value of the YAML type {node.tag} cannot be used here")
    if isinstance(value, str):
        _check_text(value, place)
    return value


def _check_text(text: str, place: str) -> None:
    """Raise ConfigError for text that no file or path can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: {text!r:.60}: half a character (a lone surrogate)") from error
    if "\0" in text:
        raise ConfigError(f"{place}: {text!r:.60}: the character 0 ends texts elsewhere; leave it out")


def _mapping(
    loader: _Loader, node: yaml.MappingNode, name: str, above: tuple[yaml.Node, ...]
) -> dict[str, YamlValue]:
    entries: dict[str, YamlValue] = {}
    for key, value in node.value:
        place = f"{name} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be a plain word")
        _check_text(key.value, place)
        if key.value in entries:
            raise ConfigError(f"{place}: {key.value!r} is given twice (first in {entries[key.value].place})")
        entries[key.value] = _entry(loader, value, name, place, above)
    return entries
