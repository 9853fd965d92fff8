"""The lookup of the method that a slot names: a module of a folder, or an import path."""

import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import ClassVar, NamedTuple

from megatron_troll.config.node import ConfigError, nearest
from megatron_troll.config.tree import Node, Slot
from megatron_troll.config.validate import read_fields


class Pairing(NamedTuple):
    """Partners of a method, and a reason that concerns them.

    key      the key that selects them: another slot of `objective`, or a key of it with fixed values
    names    methods of that slot, families of them (`SlotMethod.family`), or values of that key
    reason   completes "`method` is not defined with `partner`: "
    """

    key: str
    names: tuple[str, ...]
    reason: str


class SlotMethod(Node):
    """A method of a slot of `objective`; its fields are its configuration.

    Two methods can be combined unless one of them refuses the other.

    family  a word by which others can name this method and those like it, besides its own name; "": none
    """

    family: ClassVar[str] = ""

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        """Partners with which this method is not defined."""
        return ()

    @property
    def cautions(self) -> tuple[Pairing, ...]:
        """Partners that are allowed although no paper covers the pair; a run's summary gives the reason."""
        return ()


def known_methods(folder: str) -> tuple[str, ...]:
    """The names that `folder` (a package, "megatron_troll.objectives.kl") offers: its modules. Raises
    ConfigError if a file and a folder have the same name."""
    package = importlib.import_module(folder)
    names = []
    for module in pkgutil.iter_modules(package.__path__):
        files = [Path(path) / f"{module.name}.py" for path in package.__path__]
        if module.ispkg and (file := next(filter(Path.exists, files), None)):
            raise ConfigError(f"{file}:1: {file.with_suffix('')} is a method {module.name!r} too: rename one")
        names.append(module.name)
    return tuple(sorted(names))


def build_method[Method: Node](slot: Slot, folder: str, kind: type[Method], key: str) -> Method:
    """Build the method of `slot` with its fields; `key` is the slot's place in the tree. Raises
    ConfigError like `find_class`, and for an unknown or wrong field."""
    return read_fields(slot, find_class(slot.name, folder, kind, f"{key}.name"), key)


def find_class[Found](name: str, folder: str, kind: type[Found], key: str) -> type[Found]:
    """The one subclass of `kind` that the module `name` of `folder` defines, or the class that
    `package.module:Class` names. `key` is the name's place in the tree.

    Raises ConfigError for an unknown name (the nearest and the known ones are named), for an import path
    that does not lead to a subclass of `kind`, and for a file of `folder` that defines no such subclass,
    several, or one with undefined abstract methods (with its line)."""
    path, _, class_name = name.partition(":")
    if class_name:
        found = getattr(_import(path, key), class_name, None)
        if not (inspect.isclass(found) and issubclass(found, kind)):
            raise ConfigError(f"{key}: {name!r} does not lead to a subclass of {kind.__name__}")
    else:
        found = _defined_in(_import_known(name, folder, key), kind, key)
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise ConfigError(f"{key}: {line_of(found)}: {found.__name__} does not define {', '.join(missing)}")
    return found


def line_of(kind: type, text: str = "") -> str:
    """FILE:LINE of a class, or of the first line of its source that contains `text`."""
    lines, start = inspect.getsourcelines(kind)
    within = next((i for i, line in enumerate(lines) if text in line), 0)
    return f"{inspect.getsourcefile(kind)}:{start + within}"


def _import(path: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(f"{key}: cannot import {path!r}: {error}") from error


def _import_known(name: str, folder: str, key: str) -> ModuleType:
    known = known_methods(folder)
    if name not in known:
        hint = nearest(name, known)
        raise ConfigError(
            f"{key}: unknown method {name!r}; {hint} Known here: {', '.join(known)}; "
            "or give an import path package.module:Class"
        )
    return importlib.import_module(f"{folder}.{name}")


def _defined_in[Found](module: ModuleType, kind: type[Found], key: str) -> type[Found]:
    classes = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__
    ]
    match [member for member in classes if issubclass(member, kind)]:
        case [found]:
            return found
        case []:
            others = [f"{line_of(other)}: {other.__name__} is not one" for other in classes]
            where = ", ".join(others) or f"{module.__file__}:1"
            raise ConfigError(f"{key}: this file must define one subclass of {kind.__name__}: {where}")
        case several:
            where = ", ".join(f"{line_of(other)}: {other.__name__}" for other in several)
            raise ConfigError(f"{key}: this file must define one subclass of {kind.__name__}: {where}")
