"""Generate docs/configuration.md from the configuration tree and the methods that fill its slots:

python tools/config_reference.py > docs/configuration.md
"""

import sys
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_troll.config import Config, Gym, Node, RewardConfig, find_class, known_methods
from megatron_troll.config.shape import Shape
from megatron_troll.objectives.compose import SLOTS
from megatron_troll.observe.run_folder import CHANGEABLE
from megatron_troll.rewards.reward import Reward
from megatron_troll.rewards.terms import PartConfig, Sum

INTRODUCTION = """\
# Configuration

One tree, typed and strict: an unknown key or a wrong value is an error that names the file, the line, the
key, the nearest known key and what is allowed, before anything is computed. This page is made from
`megatron_troll/config/tree.py` and the methods themselves by `tools/config_reference.py`; do not edit it.

```sh
mtroll train examples/configs/cpu_troll.yaml name=short train.steps=10 rollout.sampling.temperature=0.8
```

- **File**: YAML, or a run folder, whose `config.yaml` is run again.
- **`extends`**: a preset of `megatron_troll/presets/` by name, a path ending in `.yaml` (relative to the
  file), or a list of either, later ones winning. A file holds only what differs.
- **Overrides**: `a.b.c=value` after the file, the value in YAML: `data.files=[a.jsonl,b.jsonl]`.
- **Merging**: mappings merge key by key; lists and plain values are replaced.
- **Slots**: `{name: METHOD, ...}` with the method's own fields beside its name. Where `name` changes, the
  fields of the method before are dropped; where there is none, the slot keeps its default method.
  `name: package.module:Class` takes a class from outside the package ([extending.md](extending.md)).
- **Resolved**: `runs/<name>/config.yaml` holds every field of the run, defaults included.
- **Resuming**: a run folder belongs to one configuration as soon as it holds figures, rollouts or a
  checkpoint. With `resume=true` a run may change how long, where
  and how it is computed, which is {changeable}.
  Any other difference is refused and listed.
"""
REWARDS = "megatron_troll.rewards.verifiers"


def markdown() -> str:
    """The text of docs/configuration.md."""
    introduction = INTRODUCTION.replace("{changeable}", ", ".join(f"`{key}`" for key in CHANGEABLE))
    return "\n".join([introduction, *sections(Config, ""), *method_sections(), *sum_sections()]) + "\n"


def sections(kind: type[BaseModel], path: str) -> Iterator[str]:
    """Yield a heading, the node's description and its own fields; then the sections of the nodes inside."""
    yield f"## `{path}`\n" if path else "## The top of the tree\n"
    yield f"{first_paragraph(kind.__doc__)}\n"
    yield from table(kind)
    for name, field in kind.model_fields.items():
        inner = node_of(field)
        if inner is not None:
            yield from sections(inner, ".".join(filter(None, (path, place(name, field)))))


def method_sections() -> Iterator[str]:
    """Yield the sections of every method of every slot, with the method's own fields."""
    yield "## Methods of the slots\n"
    yield "What may stand as `name`, and the fields of its own that go beside it.\n"
    for slot, (folder, kind) in [*SLOTS.items(), ("reward", (REWARDS, Reward))]:
        key = slot if slot == "reward" else f"objective.{slot}"
        for name in known_methods(folder):
            method = find_class(name, folder, kind, key)
            yield f"### `{key}: {{name: {name}}}`\n"
            yield f"{first_paragraph(sys.modules[method.__module__].__doc__)}\n"
            yield from table(method)


def sum_sections() -> Iterator[str]:
    """Yield the sections of a sum of rewards, which is no verifier itself."""
    for path, kind in (
        ("reward: {name: sum}", Sum),
        ("reward: {name: sum, parts: {<name>: ...}}", PartConfig),
    ):
        yield f"### `{path}`\n"
        yield f"{first_paragraph(kind.__doc__)}\n"
        yield from table(kind)


def table(kind: type[BaseModel]) -> Iterator[str]:
    """Yield a table of the fields of `kind` that are not nodes; nothing if there are none."""
    shape = Shape.of(kind)
    plain = {name: field for name, field in kind.model_fields.items() if node_of(field) is None}
    if not plain:
        return
    yield "| key | allowed | default | meaning |\n|---|---|---|---|"
    for name, field in plain.items():
        key = field.alias or name
        yield f"| `{key}` | {allowed(shape, key)} | {default(field)} | {cell(field.description or '')} |"
    yield ""


def allowed(shape: Shape, key: str) -> str:
    field = shape.child(key)
    assert field is not None
    return "a [slot](#methods-of-the-slots)" if field.is_slot else cell(field.describe())


def node_of(field: FieldInfo) -> type[BaseModel] | None:
    """The node class that a field holds: directly, as an option, or as values of a map; otherwise None."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(
        (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Node | RewardConfig | Gym)),
        None,
    )


def place(name: str, field: FieldInfo) -> str:
    return f"{name}.<name>" if getattr(field.annotation, "__origin__", None) is dict else name


def default(field: FieldInfo) -> str:
    value = field.default
    if field.default_factory is not None:
        return "see meaning"
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return f"`{inline(value.model_dump())}`"
    return f"`{inline(list(value) if isinstance(value, tuple) else value)}`"


def inline(value: Any) -> str:
    """`value` as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def first_paragraph(docstring: str | None) -> str:
    return cell(" ".join((docstring or "").strip().split("\n\n")[0].split()))


def cell(text: str) -> str:
    """Escape plain text for Markdown."""
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(markdown())
