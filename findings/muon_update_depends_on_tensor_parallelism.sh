#!/usr/bin/env bash
# megatron-core: Muon's default muon_tp_mode, "blockwise", orthogonalises each tensor-parallel shard by itself. The
# same matrix and gradient get another update on two ranks than on one, by a large part of its norm, so results
# depend on the layout. "duplicated" does not have this. One and two processes, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 emerging-optimizers==0.3.0 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

ROWS, COLUMNS = 64, 32


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


def step(rank, ranks, options, name):
    """Save what one step subtracts from a matrix of zeros whose rows are split over the ranks."""
    on_cpu()
    dist.init_process_group("gloo", init_method=Path(f"{name}-store").resolve().as_uri(), rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1, hidden_size=COLUMNS, num_attention_heads=2, tensor_model_parallel_size=ranks,
        use_cpu_initialization=True,
    )
    linear = ColumnParallelLinear(COLUMNS, ROWS, config=config, init_method=torch.nn.init.zeros_, bias=False)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), linear)
    settings = OptimizerConfig(
        optimizer="muon", lr=1.0, weight_decay=0.0, clip_grad=0.0, muon_fp32_matmul_prec="highest", **options
    )
    optimizer = get_megatron_optimizer(settings, [model])
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    linear.weight.main_grad.copy_(gradient.chunk(ranks)[rank])
    model.finish_grad_sync()
    optimizer.step()
    parts = [torch.zeros(ROWS // ranks, COLUMNS) for _ in range(ranks)]
    dist.all_gather(parts, linear.weight.detach().contiguous())
    if rank == 0:
        torch.save(torch.cat(parts), name)
    dist.destroy_process_group()


def update(ranks, **options):
    name = f"{ranks}-{'-'.join(options.values())}"
    mp.start_processes(step, args=(ranks, options, name), nprocs=ranks, start_method="fork")
    return torch.load(name)


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    print(*(f"{name} {version(name)}" for name in ("torch", "megatron-core", "emerging-optimizers")))
    print("muon_tp_mode by default:", OptimizerConfig().muon_tp_mode)
    alone = update(1)
    default, duplicated = apart(update(2), alone), apart(update(2, muon_tp_mode="duplicated"), alone)
    print("the update of one matrix by one gradient on two tensor-parallel ranks, against one rank:")
    print(f"expected: the same, as with duplicated: {duplicated:.1e} of its norm apart")
    print(f"seen by default: {default:.2f} of its norm apart")
    assert duplicated < 1e-4 and default > 0.1
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
