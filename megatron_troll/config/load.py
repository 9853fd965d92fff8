"""Reading YAML and overrides into a typed Config, and writing it back."""

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from megatron_troll.config.document import DEEPEST, LARGEST_FILE, YamlValue, parse, render
from megatron_troll.config.node import ConfigError, nearest
from megatron_troll.config.shape import Shape
from megatron_troll.config.tree import Config
from megatron_troll.config.validate import validate

PRESETS = Path(str(files("megatron_troll"))) / "presets"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, what it `extends`, and then `a.b.c=value` overrides (values are YAML).

    `extends` names a preset, a path relative to the file (it ends with .yaml), or a list of either, later
    ones winning. Mappings merge; a slot whose `name` changes loses the fields of its previous method, and one
    that is given only fields keeps its default method; `true` keeps a mapping that stands for it
    (`resume=true`). Raises ConfigError.
    """
    return assemble([read(Path(path))], overrides)


def assemble(parts: Sequence[YamlValue], overrides: Sequence[str] = ()) -> Config:
    """Build one configuration from mappings, later ones winning, and then overrides. Raises ConfigError."""
    tree = _with_names(overlay((*parts, *map(_override, overrides))), Shape.of(Config))
    return validate(Config, tree.plain(), "", lambda keys: place(tree, keys))


def overlay(parts: Iterable[YamlValue]) -> YamlValue:
    """Merge parts of a configuration, later ones winning: only written values, no defaults."""
    shape, tree = Shape.of(Config), YamlValue({}, "")
    for part in parts:
        tree = merge(tree, part, shape)
    return tree


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal Config, except that `resume` is
    true or false: what one start accepts, later starts do not."""
    return render(config.model_copy(update={"resume": bool(config.resume)}).model_dump(by_alias=True))


def merge(base: YamlValue, over: YamlValue, shape: Shape | None) -> YamlValue:
    """Merge `over` on top of `base`; `shape` is what the tree allows here."""
    if over.value is True and isinstance(base.value, dict) and shape is not None and shape.is_switch:
        return base
    if not isinstance(base.value, dict) or not isinstance(over.value, dict):
        return over
    kept = base.value
    if shape is not None and shape.is_slot and _method_changes(kept, over.value, shape):
        kept = {key: entry for key, entry in kept.items() if key in shape.keys}
    merged = dict(kept)
    for key, entry in over.value.items():
        below = shape.child(key) if shape else None
        merged[key] = merge(merged[key], entry, below) if key in merged else entry
    return YamlValue(merged, over.place)


def _method_changes(base: dict[str, YamlValue], over: dict[str, YamlValue], shape: Shape) -> bool:
    if "name" not in over:
        return False
    before = base["name"].value if "name" in base else shape.default_name
    return over["name"].value != before


def _with_names(tree: YamlValue, shape: Shape | None) -> YamlValue:
    """Return `tree` with the default method's name in every slot that has none."""
    if shape is None or not isinstance(tree.value, dict):
        return tree
    named = {key: _with_names(entry, shape.child(key)) for key, entry in tree.value.items()}
    if shape.is_slot and shape.default_name is not None:
        named.setdefault("name", YamlValue(shape.default_name, tree.place))
    return YamlValue(named, tree.place)


def read(path: Path, chain: tuple[Path, ...] = (), known: dict[Path, YamlValue] | None = None) -> YamlValue:
    """Read a file on top of all it extends. `chain` holds the files that led here, `known` what was read on
    the way, so that each file is read once. Raises ConfigError."""
    known = {} if known is None else known
    resolved = path.resolve()
    if resolved in chain:
        raise ConfigError(f"{path}: extends itself: " + " -> ".join(str(p) for p in (*chain, resolved)))
    if len(chain) == DEEPEST:
        raise ConfigError(f"{path}: extended over more than {DEEPEST} files")
    if resolved not in known:
        known[resolved] = extended(parse_file(path), path, (*chain, resolved), known)
    return known[resolved]


def parse_file(path: Path) -> YamlValue:
    """Parse a file, which must hold a mapping. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a path with the character 0
        raise ConfigError(f"{str(path)!r}: cannot be read: {error}") from error
    own = parse(text, str(path))
    if not isinstance(own.value, dict):
        raise ConfigError(f"{own.place}: expected a mapping of keys to values")
    return own


def extended(
    own: YamlValue, path: Path, chain: tuple[Path, ...] = (), known: dict[Path, YamlValue] | None = None
) -> YamlValue:
    """Merge a mapping of the file `path` on top of everything it `extends`. Raises ConfigError."""
    if not isinstance(own.value, dict):
        raise ConfigError(f"{own.place}: expected a mapping of keys to values")
    shape, deltas = Shape.of(Config), dict(own.value)
    extends = deltas.pop("extends", None)
    tree = YamlValue({}, own.place)
    for source in _sources(extends, path):
        tree = merge(tree, read(source, chain, known), shape)
    return merge(tree, YamlValue(deltas, own.place), shape)


def _sources(extends: YamlValue | None, path: Path) -> list[Path]:
    if extends is None:
        return []
    entries = extends.value if isinstance(extends.value, list) else [extends]
    sources = [_source(entry, path) for entry in entries]
    for index, source in enumerate(sources):
        if source in sources[:index]:
            raise ConfigError(f"{entries[index].place}: extends: {entries[index].value!r} is given twice")
    return sources


def _source(entry: YamlValue, path: Path) -> Path:
    name = entry.value
    if not isinstance(name, str):
        raise ConfigError(f"{entry.place}: extends: expected a preset or a path ending with .yaml")
    if name.endswith((".yaml", ".yml")):
        return path.parent / name
    preset = PRESETS / f"{name}.yaml"
    if not preset.is_file():
        known = [file.stem for file in PRESETS.glob("*.yaml")]
        raise ConfigError(f"{entry.place}: extends: no preset {name!r}; {nearest(name, known)}")
    return preset


def _override(text: str) -> YamlValue:
    key, sign, value = text.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts) or len(parts) > DEEPEST:
        raise ConfigError(f"override {text!r:.200}: expected key=value, such as train.steps=10")
    entry = YamlValue(
        parse(value, f"override {text!r}").value if value.strip() else None, f"override {text!r}"
    )
    for part in reversed(parts):
        entry = YamlValue({part: entry}, entry.place)
    return entry


def place(tree: YamlValue, keys: tuple[str | int, ...]) -> str:
    """The place at which the deepest existing part of a path was written."""
    for key in keys:
        below = tree.child(key)
        if below is None:
            break
        tree = below
    return tree.place
