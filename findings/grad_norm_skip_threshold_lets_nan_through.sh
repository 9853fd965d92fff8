#!/usr/bin/env bash
# megatron-core: grad_norm_skip_threshold skips a step whose gradient norm is too large or infinite, but not one
# whose norm is NaN: step() reports success, the bad weight becomes NaN, and the other gradients go in without
# clipping. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
from importlib.metadata import version

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig


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


on_cpu()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
print("torch", version("torch"), "megatron-core", version("megatron-core"))


class Two(torch.nn.Module):
    """One weight that gets the bad gradient, one that gets a sound one."""

    def __init__(self):
        super().__init__()
        self.bad = torch.nn.Parameter(torch.ones(4, 4))
        self.good = torch.nn.Parameter(torch.ones(4, 4))


def step(bad):
    module = Two()
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=1.0, weight_decay=0.0, sgd_momentum=0.0, clip_grad=1.0,
                        grad_norm_skip_threshold=10.0),
        [model],
    )
    module.bad.main_grad.fill_(bad)
    module.good.main_grad.fill_(3.0)
    model.finish_grad_sync()
    success, norm, _ = optimizer.step()
    moved = float((module.good.detach() - 1).abs().max()), float((module.bad.detach() - 1).abs().max())
    print(f"gradient {bad}: norm {float(norm)}, step() says {success}, moved by: good {moved[0]}, bad {moved[1]}")
    return success, moved


large, infinite, nan = step(100.0), step(float("inf")), step(float("nan"))
print("expected: with a threshold of 10 none of the three steps is taken (gradients are clipped to a norm of 1)")
print("seen: the step with a norm of NaN is taken (NaN > 10 is false), and without clipping")
assert large == infinite == (False, (0.0, 0.0))
assert nan[0] is True and nan[1][0] == 3.0 and nan[1][1] != nan[1][1]
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
