#!/usr/bin/env bash
# megatron-core: the unfused rotary embedding of packed sequences turns one sequence at a time and copies each
# into the whole. Every copy is a node of the graph whose backward goes through the whole, so that the time grows
# with the square of the number of sequences. Given the angles of every token instead of those of the longest
# sequence, the same function turns all at once. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import time
from importlib.metadata import version

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

HEADS, WIDTH, LENGTH = 4, 32, 16


class Alone:
    """A context-parallel group of one."""

    rank, size = staticmethod(lambda: 0), staticmethod(lambda: 1)


def copies(node):
    """How many copies into slices of the whole a graph ends with, one after the other."""
    count = 0
    while node is not None and node.name().endswith("CopySlices"):
        node, count = node.next_functions[0][0], count + 1
    return count


def turned(sequences, every_token):
    """Copies in the graph, seconds of forward and backward, output and gradient."""
    torch.manual_seed(0)
    t = torch.randn(sequences * LENGTH, HEADS, WIDTH, requires_grad=True)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * LENGTH
    angles = torch.randn(LENGTH, 1, 1, WIDTH)
    if every_token:
        angles = angles.repeat(sequences, 1, 1, 1)
    began = time.perf_counter()
    out = _apply_rotary_pos_emb_thd(t, starts, angles, cp_group=Alone)
    nodes = copies(out.grad_fn)
    out.square().sum().backward()
    return nodes, time.perf_counter() - began, out.detach(), t.grad


print("torch", version("torch"), "megatron-core", version("megatron-core"))
torch.set_num_threads(1)
turned(2, False)
seconds = {}
for sequences in (128, 512):
    nodes, seconds[sequences], out, grad = turned(sequences, False)
    other, least, same, also = turned(sequences, True)
    assert torch.equal(out, same) and torch.equal(grad, also)
    print(
        f"{sequences} sequences of {LENGTH} tokens: expected no copy, seen {nodes} copies into the whole, "
        f"{seconds[sequences]:.3f} s; with the angles of every token {other} and {least:.3f} s, the same numbers"
    )
    assert nodes == sequences and other == 0, (nodes, other)
growth = seconds[512] / seconds[128]
print(f"four times the sequences: expected four times the time, seen {growth:.1f} times")
assert growth > 6, growth
assert seconds[512] > 10 * least, (seconds, least)
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
