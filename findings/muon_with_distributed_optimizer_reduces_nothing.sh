#!/usr/bin/env bash
# megatron-core: Muon with use_distributed_optimizer=True, in the configuration of DDP and of the optimizer alike,
# silently gets plain optimizers. DDP then reduces each rank's part of the gradients only, every rank updates all
# weights from what it has, and the replicas differ after the first step. Two processes, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 emerging-optimizers==0.3.0 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import logging
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

RANKS = 2


def on_cpu():
    """Megatron-Core names CUDA in many places; answer with the CPU, so that no GPU is needed."""
    kind = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        result = kind(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result

    torch.cuda.current_device = torch.cpu.current_device
    torch.cuda.current_stream = torch.cpu.current_stream
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.type = cuda_type
    for name in ("tensor", "zeros"):
        make = getattr(torch, name)
        setattr(torch, name, lambda *args, make=make, **kwargs: make(*args, **{**kwargs, "device": "cpu"}))


def step(name, distributed):
    """How far the replicas are apart after one step from gradients that each rank has of its own data."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
    model = DistributedDataParallel(config, settings, module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer=name, lr=0.1, use_distributed_optimizer=distributed), [model]
    )
    torch.manual_seed(1 + rank)
    for parameter in module.parameters():
        parameter.main_grad.normal_()
    model.finish_grad_sync()
    succeeded, norm, _ = optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    replicas = [torch.zeros_like(weights) for _ in range(RANKS)]
    dist.all_gather(replicas, weights)
    apart = float((replicas[0] - replicas[1]).abs().max())
    if rank == 0:
        kinds = [type(part).__name__ for part in getattr(optimizer, "chained_optimizers", [optimizer])]
        print(f"{name}, use_distributed_optimizer={distributed}: {', '.join(kinds)}")
        print(f"  step() says {succeeded}; replicas are apart by {apart:.1e}", flush=True)
    norms = [None] * RANKS
    dist.all_gather_object(norms, float(norm))
    return apart, norms, [] if rank else kinds


def worker(rank):
    on_cpu()
    logging.disable(logging.WARNING)  # DDP says for adam and muon alike that it lays out its buffers by itself
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel()
    for name, distributed in (("adam", True), ("muon", False)):
        assert step(name, distributed)[0] == 0.0
    apart, norms, kinds = step("muon", True)
    if rank == 0:
        print("expected: an error, or a sharded state; equal replicas as in the first two")
        print(f"seen: plain optimizers, replicas {apart:.2f} apart, gradient norms {norms[0]:.2f} and {norms[1]:.2f}")
        assert kinds == ["FP32Optimizer", "FP32Optimizer"], kinds
    assert apart > 1e-2 and norms[0] != norms[1]
    dist.destroy_process_group()


if __name__ == "__main__":
    print(*(f"{name} {version(name)}" for name in ("torch", "megatron-core", "emerging-optimizers")), flush=True)
    mp.start_processes(worker, nprocs=RANKS, start_method="fork")
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
