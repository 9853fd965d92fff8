"""The values that the tree allows at each key, read from its JSON Schema: known keys, ranges, slots."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from megatron_troll.config.node import LARGEST

TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "null": "null",
}


@cache
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(by_alias=True)


@dataclass(frozen=True)
class Shape:
    """One place of the tree. `node` is its JSON Schema, `definitions` the schemas that references name."""

    node: dict[str, Any]
    definitions: dict[str, Any]

    @classmethod
    def of(cls, model: type[BaseModel]) -> "Shape":
        schema = _schema(model)
        return cls(schema, schema.get("$defs", {}))

    @property
    def keys(self) -> list[str]:
        """Known keys of a mapping; empty if this is not a mapping, or one that allows any key."""
        return list(self._object().get("properties", {}))

    @property
    def is_slot(self) -> bool:
        return self._object().get("additionalProperties") is True and "name" in self.keys

    @property
    def is_switch(self) -> bool:
        """Whether true, false and a mapping, which means true, are allowed here."""
        options = [self._follow(option).get("type") for option in self.node.get("anyOf", [])]
        return {"boolean", "object"} <= set(options)

    @property
    def default_name(self) -> str | None:
        """The method that a slot holds if the configuration names none."""
        return (self.node.get("default") or {}).get("name")

    def child(self, key: str | int) -> "Shape | None":
        """The shape under `key`; None if the key is unknown or anything is allowed there."""
        node = self._object()
        if isinstance(key, int):
            items = node.get("prefixItems", [])
            found = items[key] if key < len(items) else node.get("items")
        else:
            found = node.get("properties", {}).get(key, node.get("additionalProperties"))
        return Shape(found, self.definitions) if isinstance(found, dict) else None

    def walk(self, path: Iterable[str | int]) -> "Shape | None":
        shape: Shape | None = self
        for key in path:
            shape = shape and shape.child(key)
        return shape

    def describe(self) -> str:
        """The allowed values in words: 'an integer >= 1'."""
        node = self._follow(self.node)
        if "anyOf" in node:
            return " or ".join(Shape(option, self.definitions).describe() for option in node["anyOf"])
        if "enum" in node:
            return "one of " + ", ".join(map(str, node["enum"]))
        if "prefixItems" in node:
            parts = [Shape(item, self.definitions).describe() for item in node["prefixItems"]]
            return f"a list of {len(parts)}: " + "; ".join(parts)
        if node.get("type") == "array":
            start = "a list of one or more, each " if node.get("minItems") else "a list, each "
            return start + Shape(node["items"], self.definitions).describe()
        if self.is_slot:
            return "a method with its fields, {name: METHOD, ...}"
        if node.get("type") == "object":
            return "a mapping" + (f" with keys among {', '.join(self.keys)}" if self.keys else "")
        return TYPES.get(node.get("type", ""), "a value") + _range(node)

    def _follow(self, node: dict[str, Any]) -> dict[str, Any]:
        return self.definitions[node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node

    def _object(self) -> dict[str, Any]:
        """The schema itself, or the structured one among alternatives (`Model | None`)."""
        node = self._follow(self.node)
        options = [self._follow(option) for option in node.get("anyOf", [])]
        return next((option for option in options if option.get("type") in ("object", "array")), node)


def _range(node: dict[str, Any]) -> str:
    bounds = [("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<")]
    # The limit of every count goes without saying, except to who exceeds it (validate.py).
    parts = [f"{sign} {node[name]:.10g}" for name, sign in bounds if node.get(name, LARGEST) != LARGEST]
    return f" {' and '.join(parts)}" if parts else ""
