"""From a slot of the configuration to the method it names: a module of a folder, or an import path."""

import importlib
import inspect
import pkgutil
from types import ModuleType

from megatron_troll.config.node import ConfigError, nearest
from megatron_troll.config.tree import Node, Slot
from megatron_troll.config.validate import read_fields


def known_methods(folder: str) -> tuple[str, ...]:
    """The names that `folder` (a package, "megatron_troll.objectives.kl") offers: its modules."""
    package = importlib.import_module(folder)
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


def build_method[Method: Node](slot: Slot, folder: str, kind: type[Method], key: str) -> Method:
    """The method of `slot` with its fields read; `key` is where the slot stands in the tree. Raises
    ConfigError like `find_class`, and for an unknown or wrong field."""
    return read_fields(slot, find_class(slot.name, folder, kind, f"{key}.name"), key)


def find_class[Found](name: str, folder: str, kind: type[Found], key: str) -> type[Found]:
    """The one subclass of `kind` that the module `name` of `folder` defines, or the class that
    `package.module:Class` names. `key` is where the name stands in the tree.

    Raises ConfigError for an unknown name (the nearest and the known ones are named) and for an import path
    that leads nowhere or to something else than a `kind`."""
    path, _, class_name = name.partition(":")
    if class_name:
        found = getattr(_import(path, key), class_name, None)
    else:
        found = _defined_in(_import_known(name, folder, key), kind)
    if not (inspect.isclass(found) and issubclass(found, kind)):
        raise ConfigError(f"{key}: {name!r} does not lead to a subclass of {kind.__name__}")
    return found


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


def _defined_in[Found](module: ModuleType, kind: type[Found]) -> type[Found] | None:
    own = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, kind) and member.__module__ == module.__name__
    ]
    return own[0] if len(own) == 1 else None
