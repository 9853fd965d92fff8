"""Megatron's optimizer and learning-rate schedule for a data-parallel model."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_troll.config import Optimizer
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.parallel import device, inside
from megatron_troll.mcore.router import move_biases

# Transformer Engine's Adam expects uint8 as the dtype of fp8 moments.
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


@dataclass(frozen=True)
class Trainable:
    """A model with its optimizer and schedule."""

    model: MegatronModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler

    def step(self) -> float:
        """Update the weights from the accumulated gradients, and the experts' biases; return the global
        gradient norm before clipping. Blocks on every rank. The schedule advances first: step 1 of w warm-up
        steps uses 1/w of the learning rate."""
        self.schedule.step(1)
        with inside(self.model.groups):
            succeeded, grad_norm, _ = self.optimizer.step()  # pyright: ignore[reportGeneralTypeIssues]
            for chunk in _data_parallel(self.model):
                if chunk.ddp_config.use_distributed_optimizer:
                    chunk.start_param_sync()
        assert succeeded
        self.optimizer.zero_grad()
        move_biases(self.model.chunks)
        return float(grad_norm)

    def step_if_finite(self, loss: float) -> float | None:
        """Call `step` if the loss and every gradient of every rank are finite; otherwise update nothing and
        return None. `loss` is that of the whole step, the same on every rank. Blocks on the world."""
        return self.step() if self.finite(loss) else None

    def finite(self, loss: float) -> bool:
        """Whether the loss and every gradient of every rank are finite. Blocks on the world."""
        return self.gradients_finite() and math.isfinite(loss)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def gradients_finite(self) -> bool:
        """Whether every accumulated gradient of every rank is finite. Blocks on the world."""
        finite = torch.ones((), device=device())
        for chunk in _data_parallel(self.model):
            buffers: list[Any] = [*chunk.buffers, *chunk.expert_parallel_buffers]  # pyright: ignore[reportGeneralTypeIssues]
            for buffer in buffers:
                finite *= torch.isfinite(buffer.grad_data.sum()).float()
        return bool(self.model.groups.world.all_reduce(finite, torch.distributed.ReduceOp.MIN).item())


def _data_parallel(model: MegatronModel) -> list[DistributedDataParallel]:
    """The chunks of a model built with `trained=True`. Raises ValueError for other models."""
    chunks = [chunk for chunk in model.chunks if isinstance(chunk, DistributedDataParallel)]
    if len(chunks) < len(model.chunks):
        raise ValueError("the model was built with trained=False: it has no gradients to optimize with")
    return chunks


def chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Flat list of the optimizers that Megatron chains: one for dense and one for expert parameters if their
    groups differ, and one for Muon's matrices, which may itself be a chain."""
    if isinstance(optimizer, ChainedOptimizer):
        return [part for inner in optimizer.chained_optimizers for part in chained(inner)]
    return [] if getattr(optimizer, "is_stub_optimizer", False) else [optimizer]


def layer_wise(optimizer: MegatronOptimizer) -> list[LayerWiseDistributedOptimizer]:
    """The parts of `optimizer` that shard their state by whole matrices."""
    parts = [optimizer, *(optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [])]
    return [part for part in parts if isinstance(part, LayerWiseDistributedOptimizer)]


def trainable(model: MegatronModel, config: Optimizer, total_steps: int) -> Trainable:
    """Create optimizer and schedule over `total_steps` optimizer steps for a model built with `trained=True`.

    Raises ValueError if the model was built for another kind of optimizer.
    """
    for chunk in _data_parallel(model):
        if chunk.ddp_config.use_distributed_optimizer != config.distributed:
            raise ValueError(
                f"the model was built with optimizer.distributed: {not config.distributed}, its optimizer "
                f"has {config.distributed}: give both the same configuration"
            )
    settings = OptimizerConfig(
        **_algorithm(model, config),
        lr=config.lr,
        min_lr=config.lr * config.schedule.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.grad_norm,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        **_smaller_state(config),
    )
    with inside(model.groups):
        optimizer = get_megatron_optimizer(settings, model.chunks)  # pyright: ignore[reportArgumentType]
    for part in chained(optimizer):
        # Dense and expert parameters each have an optimizer, and each of these would gather the new weights
        # of both: `Trainable.step` gathers them once instead.
        if isinstance(part, DistributedOptimizer):
            part._defer_param_sync = True  # pyright: ignore[reportAttributeAccessIssue]
    for whole in layer_wise(optimizer):
        # Skips the gather in its own step, for the same reason.
        whole.overlap_param_gather = True
    model.config.grad_scale_func = optimizer.scale_loss
    return Trainable(model, optimizer, _schedule(optimizer, config, total_steps))


def _algorithm(model: MegatronModel, config: Optimizer) -> dict[str, Any]:
    """Megatron's config fields for AdamW, or for Muon together with it."""
    if config.name == "adamw":
        return {"optimizer": "adam", "use_distributed_optimizer": config.distributed}
    return {
        "optimizer": "muon",
        # With use_distributed_optimizer, Megatron silently builds plain optimizers, whose replicas diverge.
        "use_layer_wise_distributed_optimizer": config.distributed,
        "muon_momentum": config.muon.momentum,
        "muon_nesterov": config.muon.nesterov,
        "muon_num_ns_steps": config.muon.steps,
        "muon_extra_scale_factor": config.muon.scale,
        # The default orthogonalises each tensor-parallel shard separately, so the update depends on tp.
        "muon_tp_mode": "duplicated",
        "muon_fp32_matmul_prec": "medium" if model.config.bf16 else "highest",
    }


def _smaller_state(config: Optimizer) -> dict[str, Any]:
    """Megatron's config fields for moments in fewer bits, or for a state in host memory. Only the
    precision-aware path keeps no fp32 weights on the device for the latter. Gradients stay fp32: the LM head
    adds to them."""
    if config.offload:
        return {
            "use_precision_aware_optimizer": True,
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": config.offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    if config.precision_aware is None:
        return {}
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": MOMENTS[config.precision_aware.exp_avg],
        "exp_avg_sq_dtype": MOMENTS[config.precision_aware.exp_avg_sq],
    }


def _schedule(optimizer: MegatronOptimizer, config: Optimizer, total_steps: int) -> OptimizerParamScheduler:
    schedule = config.schedule
    steps = max(schedule.decay_steps or total_steps, schedule.warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * schedule.min_lr_ratio,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=schedule.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
