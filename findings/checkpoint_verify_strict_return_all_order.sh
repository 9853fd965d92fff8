#!/usr/bin/env bash
# megatron-core: dist_checkpointing.load(..., strict="return_all") returns (state, missing, unexpected), with the
# two words the other way round than in torch's load_state_dict: "missing" is what only the checkpoint has,
# "unexpected" is what the model asks for and the checkpoint lacks. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5 psutil==7.2.2
cat >"$tmp/finding.py" <<'EOF'
import logging
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor


def sharded(*names):
    return {name: ShardedTensor.from_rank_offsets(name, torch.ones(2)) for name in names}


def main():
    logging.disable(logging.WARNING)
    torch.cuda.current_device = torch.cpu.current_device  # so that no GPU is needed
    torch.cuda.synchronize = torch.cpu.synchronize
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    print("torch", version("torch"), "megatron-core", version("megatron-core"))

    # The checkpoint has weight and old, the model wants weight and new.
    model = torch.nn.Module()
    model.weight, model.new = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    by_torch = model.load_state_dict({"weight": torch.ones(2), "old": torch.ones(2)}, strict=False)

    Path("checkpoint").mkdir()
    dist_checkpointing.save(sharded("weight", "old"), "checkpoint")
    _, missing, unexpected = dist_checkpointing.load(sharded("weight", "new"), "checkpoint", strict="return_all")

    print("in the checkpoint: weight, old; wanted by the model: weight, new")
    print(f"expected, as torch has it: missing {by_torch.missing_keys}, unexpected {by_torch.unexpected_keys}")
    print(f"seen in megatron-core:     missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    assert (by_torch.missing_keys, by_torch.unexpected_keys) == (["new"], ["old"])
    assert (missing, unexpected) == ({"old"}, {"new"})
    dist.destroy_process_group()


if __name__ == "__main__":  # saving starts a second process, which imports this file
    main()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
