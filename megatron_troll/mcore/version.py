"""Check for the pinned megatron-core and the oldest supported flash-linear-attention, importing neither."""

import re
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.version import Version

from megatron_troll.config import ConfigError

OLDEST_LINEAR_ATTENTION = "0.6"


def pinned() -> str:
    """The version of megatron-core that pyproject.toml pins."""
    (line,) = (line for line in requires("megatron-troll") or [] if line.startswith("megatron-core"))
    return re.split("==", line)[1].split(";")[0].strip()


def check_version() -> None:
    """Raise ConfigError naming both versions if another megatron-core is installed: we rely on its internals
    (docs/megatron-core.md). Reads the package's metadata, because its `__version__` ends in the commit of
    whatever repository contains the environment."""
    found, wanted = version("megatron-core"), pinned()
    if found != wanted:
        raise ConfigError(
            f"megatron-core {found} is installed, and this version of megatron-troll runs on {wanted} only: "
            f"run `make env`, or pip install megatron-core=={wanted}"
        )


def linear_attention() -> str:
    """The installed release of flash-linear-attention. Its kernels are in the package fla-core, which the
    oldest releases did not have. Raises PackageNotFoundError if it is not installed."""
    try:
        return version("fla-core")
    except PackageNotFoundError:
        return version("flash-linear-attention")


def check_linear_attention(found: str) -> None:
    """Raise ConfigError if `found` is too old. Before 0.6 the kernels take the number of heads from the keys,
    and leave the output of all further value heads uninitialised."""
    if Version(found) < Version(OLDEST_LINEAR_ATTENTION):
        raise ConfigError(
            f"flash-linear-attention {found} is installed, whose kernels give wrong results if value "
            f"heads share a key head; {OLDEST_LINEAR_ATTENTION} or newer is needed: "
            f"pip install 'flash-linear-attention>={OLDEST_LINEAR_ATTENTION}'"
        )
