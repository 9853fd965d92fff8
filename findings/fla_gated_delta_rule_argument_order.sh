#!/usr/bin/env bash
# fla-core (flash-linear-attention): its functions for one and the same gated delta rule take the gate g and beta in
# different orders. Both have one shape, so a call by position that is right for one of them is silently wrong for
# another: the recurrent reference in torch takes beta first, the others g. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 fla-core==0.6.0 numpy==2.3.5 packaging==26.3 # which fla-core imports and does not declare
cat >"$tmp/finding.py" <<'EOF'
import inspect
import logging
from importlib.metadata import version

logging.disable(logging.WARNING)  # it says that there is no GPU

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule

print("torch", version("torch"), "fla-core", version("fla-core"))
order = {}
for function in (
    chunk_gated_delta_rule, fused_recurrent_gated_delta_rule,
    naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule,
):
    order[function.__name__] = list(inspect.signature(function).parameters)[3:5]
    print(f"  {function.__name__}(q, k, v, {', '.join(order[function.__name__])}, ...)")

torch.manual_seed(0)
batch, length, heads, width = 1, 64, 2, 8
q, k, v = (torch.randn(batch, length, heads, width) for _ in range(3))
k = torch.nn.functional.normalize(k, dim=-1)
g = torch.nn.functional.logsigmoid(torch.randn(batch, length, heads))
beta = torch.randn(batch, length, heads).sigmoid()


def apart(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


chunked = naive_chunk_gated_delta_rule(q, k, v, g, beta)[0]
by_name = naive_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta)[0]
by_position = naive_recurrent_gated_delta_rule(q, k, v, g, beta)[0]
print("the two references in torch, given q, k, v, g, beta in this order:")
print(f"expected: equal, as by name: {apart(by_name, chunked):.1e} of the norm apart")
print(f"seen by position: {apart(by_position, chunked):.2g} of the norm apart, no error")
assert order == {
    "chunk_gated_delta_rule": ["g", "beta"],
    "fused_recurrent_gated_delta_rule": ["g", "gk"],
    "naive_chunk_gated_delta_rule": ["g", "beta"],
    "naive_recurrent_gated_delta_rule": ["beta", "g"],
}
assert by_position.shape == chunked.shape
assert apart(by_name, chunked) < 1e-4 and not apart(by_position, chunked) < 0.1
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
