#!/usr/bin/env bash
# megatron-core: vocab_parallel_cross_entropy writes the softmax over fp32 logits that are given to it. With
# bf16 logits it works on a copy. An entropy that is taken from the same fp32 logits after the loss is wrong,
# and nothing is raised. Needs no GPU.
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
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("torch", version("torch"), "megatron-core", version("megatron-core"))

torch.manual_seed(0)
original = torch.randn(4, 2, 16)
target = torch.randint(0, 16, (4, 2))


def entropy(logits):
    log_probs = logits.float().log_softmax(-1)
    return float(-(log_probs.exp() * log_probs).sum(-1).mean())


changed = {}
for dtype in (torch.float32, torch.bfloat16):
    logits = original.to(dtype, copy=True)
    before = logits.clone()
    expected = entropy(before)
    loss = vocab_parallel_cross_entropy(logits, target, tp_group=dist.group.WORLD)
    by_torch = F.cross_entropy(before.float().flatten(0, 1), target.flatten(), reduction="none").view(4, 2)
    torch.testing.assert_close(loss, by_torch)
    changed[dtype] = not torch.equal(logits, before)
    is_softmax = torch.allclose(logits.float(), before.float().softmax(-1))
    print(f"{dtype}: the loss equals torch's; logits changed: {changed[dtype]}; they are now the softmax: {is_softmax}")
    print(f"  entropy after the loss: expected {expected:.3f}, seen {entropy(logits):.3f}")
    if dtype == torch.float32:
        assert is_softmax and abs(entropy(logits) - expected) > 0.1
    else:
        assert entropy(logits) == expected

print("expected: a loss function leaves its input as it was, in every dtype, as torch's does")
print("seen: fp32 logits are overwritten, bf16 logits are not")
assert changed == {torch.float32: True, torch.bfloat16: False}
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
