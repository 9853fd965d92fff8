#!/usr/bin/env bash
# megatron-core: RouterReplay keeps the routers of all models of a process in one class-level list. With a second
# model (a reference, a critic) the routing of one model cannot be set: set_replay_data raises ValueError, and what
# is recorded has both models in it. Needs no GPU.
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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

torch.cuda.current_device = torch.cpu.current_device  # so that no GPU is needed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
print("torch", version("torch"), "megatron-core", version("megatron-core"))

LAYERS = 3
config = TransformerConfig(
    num_layers=LAYERS, hidden_size=8, num_attention_heads=1, num_moe_experts=4, moe_router_topk=2,
    moe_router_load_balancing_type="none", moe_enable_routing_replay=True, add_bias_linear=False,
)
groups = ProcessGroupCollection.use_mpu_process_groups()


def model():
    """The routers of a model with three layers."""
    return [TopKRouter(config, pg_collection=groups) for _ in range(LAYERS)]


routing = [torch.tensor([[0, 1], [2, 3]]) for _ in range(LAYERS)]
policy = model()
RouterReplay.set_replay_data(routing)
print(f"one model of {LAYERS} layers: {LAYERS} tensors are taken")

reference = model()
print("expected: the policy's routing is set as before")
try:
    RouterReplay.set_replay_data(routing)
except ValueError as error:
    seen = str(error)
    print(f"seen: ValueError: {seen}")
else:
    raise AssertionError("the policy's routing was set")

RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
hidden = torch.randn(2, 1, 8)
for router in policy:
    router(hidden)
recorded = RouterReplay.get_recorded_data()
print(f"the policy alone ran; recorded: {len(recorded)} entries, of which {recorded.count(None)} None")

del reference
print(f"the other model deleted: the list still has {len(RouterReplay.global_router_replay_instances)} routers")
assert "(3)" in seen and "(6)" in seen
assert len(recorded) == 6 and [entry is None for entry in recorded] == [False] * 3 + [True] * 3
assert len(RouterReplay.global_router_replay_instances) == 6
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
