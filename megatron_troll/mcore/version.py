"""The one megatron-core and the oldest flash-linear-attention to run on. Neither is imported."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.version import Version

from megatron_troll.config.node import ConfigError

OLDEST_LINEAR_ATTENTION = "0.6"


def pinned() -> str:
    """The version that pyproject.toml asks for."""
    (line,) = (line for line in requires("megatron-troll") or [] if line.startswith("megatron-core"))
    return re.split("==", line)[1].split(";")[0].strip()


def check_version() -> None:
    """Raise ConfigError naming both versions where another megatron-core is installed: its internals are
    relied upon (docs/megatron-core.md). Its own `__version__` ends in the commit of whatever repository
    encloses the environment, so the package's metadata are asked."""
    found, wanted = version("megatron-core"), pinned()
    if found != wanted:
        raise ConfigError(
            f"megatron-core {found} is installed, and this version of megatron-troll runs on {wanted} alone: "
            f"run `make env`, or pip install megatron-core=={wanted}"
        )


def linear_attention() -> str:
    """The release of flash-linear-attention that is installed. Its kernels are in fla-core; the oldest
    releases had no such part. Raises PackageNotFoundError."""
    try:
        return version("fla-core")
    except PackageNotFoundError:
        return version("flash-linear-attention")


def check_linear_attention(found: str) -> None:
    """Raise ConfigError where `found` is too old. Before 0.6 the kernels take the number of heads from the
    keys, and leave the output of all further value heads uninitialised."""
    if Version(found) < Version(OLDEST_LINEAR_ATTENTION):
        raise ConfigError(
            f"flash-linear-attention {found} is installed, whose kernels give wrong results where value "
            f"heads share a key head; {OLDEST_LINEAR_ATTENTION} or newer is needed: "
            f"pip install 'flash-linear-attention>={OLDEST_LINEAR_ATTENTION}'"
        )
