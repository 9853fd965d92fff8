"""Checks of the package versions on a node."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version

import torch
from torch.cuda import nccl

from megatron_troll.config import ConfigError
from megatron_troll.mcore.version import check_linear_attention, pinned
from megatron_troll.preflight.finding import Finding, failed, passed, warned

# A module that only NVIDIA Apex has: `apex` on PyPI is another package.
NVIDIA_APEX = "amp_C"
LINEAR_ATTENTION = "flash-linear-attention"
# Package -> the module of it that a run imports.
EXTENSIONS = {
    "transformer-engine": "transformer_engine.pytorch",
    LINEAR_ATTENTION: "fla.ops.gated_delta_rule",
}


def findings(cuda: bool, find: Callable[[str], str] = version) -> Iterator[Finding]:
    """Check all packages. `cuda`: this node has a GPU. `find` returns the version of a distribution."""
    yield passed("torch", f"{torch.__version__}, CUDA {torch.version.cuda}" if cuda else torch.__version__)
    yield core(find("megatron-core"), pinned())
    if not cuda:
        return
    yield passed("nccl", ".".join(map(str, nccl.version())))
    for name, module in EXTENSIONS.items():
        yield extension(name, module, find)
    yield apex()


def extension(name: str, module: str, find: Callable[[str], str] = version) -> Finding:
    """Check that a package with compiled parts is installed, not too old, and importable with this torch.
    Waits for the import, which runs in its own process: a package built for another torch may crash it."""
    try:
        found = find(name)
    except PackageNotFoundError:
        return warned(name, "not installed", f"install {name}: without it the slower path in torch runs")
    try:
        if name == LINEAR_ATTENTION:
            check_linear_attention(found)
    except ConfigError as error:
        return failed(name, found, str(error))
    tried = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False
    )
    if tried.returncode == 0:
        return passed(name, found)
    why = (tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]
    return failed(
        name,
        f"{found}, but `import {module}` fails: {why}",
        f"build it against torch {torch.__version__} (see the Dockerfile)",
    )


def core(found: str, wanted: str) -> Finding:
    if found == wanted:
        return passed("megatron-core", found)
    return failed("megatron-core", found, f"install megatron-core=={wanted}: the trainer uses its internals")


def apex() -> Finding:
    """Check for NVIDIA Apex, which has compiled parts; `apex` on PyPI is a web framework."""
    if importlib.util.find_spec(NVIDIA_APEX) is not None:
        return passed("apex", "NVIDIA Apex")
    if importlib.util.find_spec("apex") is None:
        return warned("apex", "not installed", "build NVIDIA Apex for fused optimizers (see the Dockerfile)")
    return failed(
        "apex",
        f"apex {_version('apex')} is not NVIDIA's",
        "pip uninstall apex, then build NVIDIA Apex from its repository (see the Dockerfile)",
    )


def _version(name: str) -> str:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return "of unknown version"
