"""The one megatron-core that this package runs on. Megatron-Core is not imported."""

import re
from importlib.metadata import requires, version


def pinned() -> str:
    """The version that pyproject.toml asks for."""
    (line,) = (line for line in requires("megatron-troll") or [] if line.startswith("megatron-core"))
    return re.split("==", line)[1].split(";")[0].strip()


def check_version() -> None:
    """Raise ValueError naming both versions where another megatron-core is installed: its internals are
    relied upon (docs/megatron-core.md). Its own `__version__` ends in the commit of whatever repository
    encloses the environment, so the package's metadata are asked."""
    found, wanted = version("megatron-core"), pinned()
    if found != wanted:
        raise ValueError(
            f"megatron-core {found} is installed, and this version of megatron-troll runs on {wanted} alone: "
            f"run `make env`, or pip install megatron-core=={wanted}"
        )
