#!/usr/bin/env bash
# megatron-core: with overlap_param_gather, optimizer.step() leaves the weights that other ranks own as they were
# until the next forward. Weights that are exported or sent to an inference server right after step() are half old.
# start_param_sync(force_sync=True) first gives all of the new ones. Two processes, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import logging
import sys
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


def stepped(overlap):
    """A module and its DDP, right after one step(); and its weights before it."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
    model = DistributedDataParallel(config, settings, module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=0.1, use_distributed_optimizer=True, overlap_param_gather=overlap), [model]
    )
    before = weights(module)
    model(torch.randn(4, 32)).pow(2).mean().backward()
    model.finish_grad_sync()
    optimizer.step()
    return module, model, before


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def share(mask):
    return float(mask.float().mean())


def worker(rank):
    on_cpu()
    logging.disable(logging.WARNING)  # DDP says that it lays out its buffers by itself
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel()
    expected = weights(stepped(overlap=False)[0])
    module, model, before = stepped(overlap=True)
    after = weights(module)
    new, old = share(after == expected), share(after == before)
    model.start_param_sync(force_sync=True)
    synced = share(weights(module) == expected)
    by_forward, forward, _ = stepped(overlap=True)
    forward(torch.randn(4, 32))
    later = share(weights(by_forward) == expected)
    for turn in range(RANKS):
        if turn == rank:
            print(f"rank {rank}: expected after step(): 100% of the weights are the new ones")
            print(f"  seen after step(): {new:.0%} new, {old:.0%} as before the step")
            print(f"  after start_param_sync(force_sync=True): {synced:.0%} new; after a forward: {later:.0%}")
            sys.stdout.flush()
        dist.barrier()
    assert 0.4 < new < 0.6 and 0.4 < old < 0.6 and synced == later == 1.0
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", version("torch"), "megatron-core", version("megatron-core"), flush=True)
    mp.start_processes(worker, nprocs=RANKS, start_method="fork")
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
