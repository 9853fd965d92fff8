"""Versions of what runs on a node."""

import importlib.util
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, version

import torch
from torch.cuda import nccl

from megatron_troll.mcore.version import pinned
from megatron_troll.preflight.finding import Finding, failed, passed, warned

# Ours and PyPI's name for it: PyPI's `apex` is another package.
NVIDIA_APEX = "amp_C"
EXTENSIONS = {"transformer-engine": "transformer_engine", "flash-linear-attention": "fla"}


def findings(cuda: bool, find: Callable[[str], str] = version) -> Iterator[Finding]:
    """`cuda`: whether this node has a GPU. `find` gives the version of a distribution."""
    yield passed("torch", f"{torch.__version__}, CUDA {torch.version.cuda}" if cuda else torch.__version__)
    yield core(find("megatron-core"), pinned())
    if not cuda:
        return
    yield passed("nccl", ".".join(map(str, nccl.version())))
    for name in EXTENSIONS:
        try:
            yield passed(name, find(name))
        except PackageNotFoundError:
            yield warned(name, "not installed", f"install {name}: without it the slower path in torch runs")
    yield apex()


def core(found: str, wanted: str) -> Finding:
    if found == wanted:
        return passed("megatron-core", found)
    return failed("megatron-core", found, f"install megatron-core=={wanted}: its internals are relied upon")


def apex() -> Finding:
    """NVIDIA Apex has compiled parts; the package of that name on PyPI is a web framework."""
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
