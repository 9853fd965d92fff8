"""Check a model's options: against the model and each other, and on this machine. Without Megatron-Core."""

import importlib.util

import torch

from megatron_troll.config import ConfigError, Model, MoE, Muon
from megatron_troll.mcore.layout import uses_te
from megatron_troll.mcore.shape import ModelShape


def check_options(shape: ModelShape, model: Model) -> None:
    """Raise ConfigError naming the first option that does not apply to this model or excludes another."""
    if not shape.experts and model.moe != MoE():
        changed = model.moe.model_dump(exclude_defaults=True)
        raise ConfigError(f"moe={changed} needs a model with experts; this is {shape.family}: leave it out")
    unfit = {"mlp"} if shape.experts else {"moe", "moe_act"}
    for module in (module for module in model.recompute_modules if module in unfit):
        kind = "with" if shape.experts else "without"
        raise ConfigError(f"recompute_modules: {module} is not part of a model {kind} experts; leave it out")
    if model.moe.dispatcher == "deepep" and model.layout.ep * model.layout.etp == 1:
        raise ConfigError("moe.dispatcher=deepep needs layout.ep or layout.etp above 1; use alltoall")
    optimizer = model.optimizer
    special = {"offload": optimizer.offload > 0, "precision_aware": optimizer.precision_aware is not None}
    for name in (name for name, wanted in special.items() if wanted):
        if not optimizer.distributed:
            raise ConfigError(f"optimizer.{name} needs optimizer.distributed=true")
        if model.dtype != "bf16":
            raise ConfigError(f"optimizer.{name} needs dtype=bf16; it is {model.dtype}")
    _check_muon(model)
    if all(special.values()):
        raise ConfigError(
            "optimizer.precision_aware and optimizer.offload exclude each other: Megatron keeps an offloaded "
            "state in fp32; leave one out"
        )


def _check_muon(model: Model) -> None:
    optimizer = model.optimizer
    if optimizer.name != "muon":
        if optimizer.muon != Muon():
            changed = optimizer.muon.model_dump(exclude_defaults=True)
            raise ConfigError(f"optimizer.muon={changed} needs optimizer.name=muon; leave it out")
        return
    if optimizer.distributed and model.dtype != "bf16":
        raise ConfigError(
            "optimizer.name=muon shards its state by matrices, which Megatron does only in bf16; dtype is "
            f"{model.dtype}: set optimizer.distributed=false or dtype=bf16"
        )
    for name in ("offload", "precision_aware"):
        if getattr(optimizer, name):
            raise ConfigError(
                f"optimizer.{name} is for the state of adamw; leave it out with optimizer.name=muon"
            )


def check_muon_layout(shape: ModelShape, model: Model, world: int) -> None:
    """Raise ConfigError for a layout over `world` ranks in which experts have replicas but dense weights do
    not: Megatron then shards nothing, sums the gradient of an expert only on one of its replicas, updates all
    of them, and counts experts twice in the norm."""
    layout, optimizer = model.layout, model.optimizer
    if not (optimizer.name == "muon" and optimizer.distributed and shape.experts):
        return
    dense, experts = (world // (n * layout.pp) for n in (layout.tp, layout.ep * layout.etp))
    if dense == 1 < experts:
        raise ConfigError(
            f"optimizer.name=muon cannot shard its state if every expert is on {experts} ranks and every "
            f"dense weight on one (tp={layout.tp}, ep={layout.ep}, etp={layout.etp}): set "
            "optimizer.distributed=false, or ep or etp higher"
        )


def check_machine(model: Model) -> None:
    """Raise ConfigError naming the first option that this machine does not support, and what to install."""
    cuda = torch.cuda.is_available()
    if "moe_act" in model.recompute_modules and model.recompute == "selective" and not uses_te(model.spec):
        raise ConfigError(
            "recompute_modules: moe_act needs Transformer Engine's grouped experts; recompute moe instead"
        )
    needs = {
        "moe.dispatcher=deepep": (
            model.moe.dispatcher == "deepep",
            "deep_ep",
            "DeepEP (https://github.com/deepseek-ai/DeepEP), or use moe.dispatcher=alltoall",
        ),
        "optimizer.precision_aware": (
            model.optimizer.precision_aware is not None,
            "transformer_engine",
            "Transformer Engine, which has this Adam, or leave the option out",
        ),
        "optimizer.offload": (model.optimizer.offload > 0, None, ""),
    }
    for option, (wanted, package, what) in needs.items():
        if wanted and not cuda:
            raise ConfigError(f"{option} needs CUDA, and there is none here")
        if wanted and package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{option} needs the package {package}: install {what}")
