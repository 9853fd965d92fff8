#!/usr/bin/env bash
# megatron-core: resharding (swap_model_weights) counts experts over ranks for grouped experts alone. With
# SequentialMLP, from one expert-parallel rank to two, every rank gets the first experts: the other half of the
# model is lost, and nothing is raised. Two processes, no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding.refit import swap_model_weights
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP

EXPERTS, RANKS = 4, 2


class Model(MegatronModule):
    """The experts of this rank; the weights of expert n are n, or -1 before they are set."""

    def __init__(self, ep, alone):
        groups = ProcessGroupCollection(
            tp=alone, pp=alone, cp=alone, ep=ep, expt_tp=alone, dp=dist.group.WORLD,
            expt_dp=alone if ep is dist.group.WORLD else dist.group.WORLD,
        )
        config = TransformerConfig(
            num_layers=1, hidden_size=4, num_attention_heads=1, num_moe_experts=EXPERTS, moe_router_topk=2,
            expert_model_parallel_size=ep.size(), add_bias_linear=False, use_cpu_initialization=True,
        )
        super().__init__(config)
        self.pg_collection = groups
        self.mine = [ep.rank() * EXPERTS // ep.size() + n for n in range(EXPERTS // ep.size())]
        linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.experts = SequentialMLP(len(self.mine), config, linear, pg_collection=groups)

    def fill(self, values):
        for expert, value in zip(self.experts.local_experts, values, strict=True):
            for parameter in expert.parameters():
                torch.nn.init.constant_(parameter, value)

    def held(self):
        return [int(expert.linear_fc1.weight[0, 0]) for expert in self.experts.local_experts]


def on_cpu():
    """Streams and pinned memory are all that resharding needs a GPU for."""
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **{**kwargs, "pin_memory": False})
    torch.cuda.current_device = torch.cpu.current_device
    torch.cuda.Stream = torch.cuda.current_stream = MagicMock()
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.synchronize = lambda: None


def worker(rank):
    on_cpu()
    dist.init_process_group("gloo", init_method=Path("store").resolve().as_uri(), rank=rank, world_size=RANKS)
    alone = [dist.new_group([n]) for n in range(RANKS)][rank]
    source, target = Model(alone, alone), Model(dist.group.WORLD, alone)
    source.fill(source.mine)
    target.fill([-1] * len(target.mine))
    swap_model_weights(source, target, "gloo")
    for turn in range(RANKS):
        if turn == rank:
            print(f"rank {rank}: expected experts {target.mine}, seen {target.held()}", flush=True)
        dist.barrier()
    assert target.held() == [0, 1], target.held()
    assert target.mine == [[0, 1], [2, 3]][rank]
    dist.destroy_process_group()


if __name__ == "__main__":
    print("torch", version("torch"), "megatron-core", version("megatron-core"))
    print(f"{EXPERTS} experts, from a model with all on every rank to one with half on each:", flush=True)
    mp.start_processes(worker, nprocs=RANKS, start_method="fork")
    print("no error was raised; experts 2 and 3 are on no rank")
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
