#!/usr/bin/env bash
# megatron-core: RouterReplay.set_replay_data also queues the routing for a backward pass, even if the forward that
# follows has none (an evaluation, old log-probabilities). The next REPLAY_BACKWARD, which activation recompute
# needs, takes that older routing: the loss is right, the gradients are not, nothing is raised. Needs no GPU.
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
from torch.utils.checkpoint import checkpoint

torch.cuda.current_device = torch.cpu.current_device  # so that no GPU is needed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
print("torch", version("torch"), "megatron-core", version("megatron-core"))

torch.manual_seed(0)
TOKENS, EXPERTS = 6, 4
config = TransformerConfig(
    num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=EXPERTS, moe_router_topk=2,
    moe_router_load_balancing_type="none", moe_enable_routing_replay=True, add_bias_linear=False,
)
router = TopKRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
hidden, value = torch.randn(TOKENS, 1, 8), torch.randn(TOKENS, EXPERTS)
older, newer = (torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)]) for _ in range(2))


def weighted(hidden):
    return (router(hidden)[0] * value).sum()


def evaluate(indices):
    """A forward pass alone, under a routing that was recorded elsewhere."""
    RouterReplay.set_replay_data([indices])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with torch.no_grad():
        weighted(hidden)


def train(indices, recompute):
    """The loss and the router's gradient under `indices`, with or without recomputed activations."""
    router.zero_grad()
    RouterReplay.set_replay_data([indices])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    loss = checkpoint(weighted, hidden, use_reentrant=True) if recompute else weighted(hidden)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    loss.backward()
    return float(loss), router.weight.grad.clone()


def off(gradient):
    return float((gradient - right).norm() / right.norm())


hidden.requires_grad_()
right_loss, right = train(newer, recompute=False)
RouterReplay.clear_global_indices()
loss, gradient = train(newer, recompute=True)
print(f"recomputed: loss {loss:.6f} of {right_loss:.6f}, gradient off by {off(gradient):.1e} of its norm")
alone = off(gradient)

RouterReplay.clear_global_indices()
evaluate(older)
loss, gradient = train(newer, recompute=True)
print("the same after one forward-only replay:")
print(f"expected: loss {right_loss:.6f}, gradient off by {alone:.1e}")
print(f"seen: loss {loss:.6f}, gradient off by {off(gradient):.2f} of its norm")
assert alone < 1e-6 and abs(loss - right_loss) < 1e-6 and off(gradient) > 0.1

RouterReplay.clear_global_indices()
evaluate(older)
RouterReplay.clear_global_indices()
loss, gradient = train(newer, recompute=True)
print(f"with clear_global_indices() in between: off by {off(gradient):.1e}")
assert off(gradient) < 1e-6
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
