#!/usr/bin/env bash
# megatron-core: where experts are split over ranks, the optimizer is a chain of one distributed optimizer for dense
# weights and one for experts, and step() of each gathers the weights of both: twice the traffic of one gather,
# with the same result. Without experts there is one gather. Two processes, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import logging
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, param_and_grad_buffer
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

RANKS, SIZE = 2, 64


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


def gathered(experts):
    """Bytes gathered in one step() by a dense matrix and, if wanted, an expert on each rank."""
    config = TransformerConfig(
        num_layers=1, hidden_size=SIZE, num_attention_heads=2, use_cpu_initialization=True,
        num_moe_experts=RANKS if experts else None, expert_model_parallel_size=RANKS if experts else 1,
    )
    linear = {"config": config, "init_method": torch.nn.init.normal_, "bias": False}
    module = torch.nn.ModuleDict({"dense": ColumnParallelLinear(SIZE, SIZE, **linear)})
    if experts:
        group = parallel_state.get_expert_tensor_parallel_group()
        module["experts"] = ColumnParallelLinear(SIZE, SIZE, is_expert=True, tp_group=group, **linear)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, settings, module)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [model])
    for parameter in module.parameters():
        parameter.main_grad.normal_()
    model.finish_grad_sync()

    calls = []
    gather = param_and_grad_buffer.dist_all_gather_func

    def counted(output, source, group, **kwargs):
        if group.size() > 1:
            calls.append(output.numel() * output.element_size())
        return gather(output, source, group=group, **kwargs)

    param_and_grad_buffer.dist_all_gather_func = counted
    optimizer.step()
    once = calls.copy()
    model.start_param_sync()
    param_and_grad_buffer.dist_all_gather_func = gather
    return once, calls[len(once):], len(optimizer.chained_optimizers)


def worker(rank):
    on_cpu()
    logging.disable(logging.WARNING)  # DDP says that it lays out its buffers by itself
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=RANKS)
    seen = {experts: gathered(experts) for experts in (False, True)}
    if rank == 0:
        for experts, (step, needed, parts) in seen.items():
            print(f"dense weights{' and experts' if experts else ' alone'}: optimizers in the chain: {parts}")
            print(f"  expected: all-gathers of {needed} bytes, as of one start_param_sync(); seen in step(): {step}")
    for experts, (step, needed, _) in seen.items():
        assert needed == [4 * SIZE * SIZE], needed
        assert step == needed * (2 if experts else 1), step
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", version("torch"), "megatron-core", version("megatron-core"), flush=True)
    mp.start_processes(worker, nprocs=RANKS, start_method="fork")
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
