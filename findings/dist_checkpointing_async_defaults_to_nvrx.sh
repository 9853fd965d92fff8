#!/usr/bin/env bash
# megatron-core: dist_checkpointing.save(..., async_sharded_save=True) takes the strategy "nvrx" by default, which
# needs nvidia-resiliency-ext. A plain install does not bring it, so the call fails with ModuleNotFoundError;
# async_strategy="mcore" works. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5 psutil==7.2.2
cat >"$tmp/finding.py" <<'EOF'
import logging
from importlib.metadata import requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor


def save(folder, **options):
    Path(folder).mkdir()
    state = {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(2))}
    return dist_checkpointing.save(state, folder, async_sharded_save=True, **options)


def main():
    logging.disable(logging.WARNING)
    torch.cuda.current_device = torch.cpu.current_device  # so that no GPU is needed
    torch.cuda.synchronize = torch.cpu.synchronize
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    print("torch", version("torch"), "megatron-core", version("megatron-core"))
    declared = [need for need in requires("megatron-core") if "extra ==" not in need]
    print("dependencies of a plain install:", declared)
    assert not any("resiliency" in need for need in declared)

    print("expected: the default of an asynchronous save works after a plain install")
    try:
        save("default")
    except ModuleNotFoundError as error:
        seen = str(error)
    else:
        raise AssertionError("the default works")
    print(f"seen: ModuleNotFoundError: {seen}")
    request = save("mcore", async_strategy="mcore")
    print(f'with async_strategy="mcore": {type(request).__name__}')
    request.execute_sync()
    loaded = dist_checkpointing.load({"weight": ShardedTensor.from_rank_offsets("weight", torch.zeros(2))}, "mcore")
    print("  which, run, gives a checkpoint that loads:", loaded["weight"].tolist())
    assert "nvidia-resiliency-ext" in seen and loaded["weight"].tolist() == [1.0, 1.0]
    dist.destroy_process_group()


if __name__ == "__main__":  # saving starts a second process, which imports this file
    main()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
