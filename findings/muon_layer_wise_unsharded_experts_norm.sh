#!/usr/bin/env bash
# megatron-core: layer-wise distributed Muon shards nothing where dense weights have one replica, even if experts have
# more (tensor parallelism with expert tensor parallelism 1). DDP has reduced the gradient of an expert on one replica
# alone, yet each of them updates every expert, and the partial gradients count in the norm. Two processes, no GPU.
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
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer, tag_params_for_buffer_routing
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

RANKS, SIZE = 2, 32


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


def step(layer_wise):
    """One step in bf16 of a dense matrix, split over the ranks, and two experts that every rank has whole. Returns
    the norm and how many matrices this rank's optimizer updates."""
    config = TransformerConfig(
        num_layers=1, hidden_size=SIZE, num_attention_heads=2, num_moe_experts=2, add_bias_linear=False, bf16=True,
        tensor_model_parallel_size=RANKS, expert_tensor_parallel_size=1, sequence_parallel=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True,
    )
    linear = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
    group = parallel_state.get_expert_tensor_parallel_group()
    module = torch.nn.ModuleDict({"dense": ColumnParallelLinear(SIZE, SIZE, **linear)})
    module["experts"] = torch.nn.ModuleList(
        ColumnParallelLinear(SIZE, SIZE, is_expert=True, tp_group=group, **linear) for _ in range(2)
    )
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=layer_wise)
    layout = None
    if layer_wise:
        tag_params_for_buffer_routing([module])
        layout = LayerWiseDistributedOptimizer.compute_full_param_layout(
            list(module.parameters()), None, parallel_state.get_data_parallel_world_size(), settings,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
    model = DistributedDataParallel(config, settings, module, full_param_layout=layout)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="muon", lr=0.1, weight_decay=0.0, bf16=True, params_dtype=torch.bfloat16,
                        use_layer_wise_distributed_optimizer=layer_wise),
        [model],
    )
    torch.manual_seed(dist.get_rank())
    for parameter in module.parameters():
        parameter.main_grad.normal_()
    model.finish_grad_sync()
    _, norm, _ = optimizer.step()
    return float(norm), sum(len(group["params"]) for group in optimizer.param_groups)


def worker(rank):
    on_cpu()
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS, expert_tensor_parallel_size=1)
    dense, experts = (getattr(parallel_state, f"get_{kind}data_parallel_world_size")() for kind in ("", "expert_"))
    plain, sharded = step(layer_wise=False), step(layer_wise=True)
    if rank == 0:
        print(f"replicas of a dense weight: {dense}, of an expert: {experts}")
        print(f"expected with layer-wise sharding: 2 matrices for each rank, dense and one expert; norm {plain[0]:.2f}")
        print(f"seen: {sharded[1]} matrices for each rank, as without sharding ({plain[1]}); norm {sharded[0]:.2f}")
    assert (dense, experts) == (1, 2) and plain[1] == sharded[1] == 3
    assert sharded[0] > 1.1 * plain[0]
    dist.destroy_process_group()


if __name__ == "__main__":
    print(*(f"{name} {version(name)}" for name in ("torch", "megatron-core", "emerging-optimizers")), flush=True)
    mp.start_processes(worker, nprocs=RANKS, start_method="fork")
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
