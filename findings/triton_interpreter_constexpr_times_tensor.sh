#!/usr/bin/env bash
# triton: in the interpreter (TRITON_INTERPRET=1) of 3.7.1 a constant that stands before a tensor fails, CONSTANT *
# tensor, while tensor * CONSTANT works. CONSTANT is a tl.constexpr of the module, the only kind of global that a
# kernel may read. The compiler takes both orders. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import os
from importlib.metadata import version

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CONSTANT = tl.constexpr(3.0)


@triton.jit
def constant_first(source, result, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(result + at, CONSTANT * tl.load(source + at))


@triton.jit
def tensor_first(source, result, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(result + at, tl.load(source + at) * CONSTANT)


def compiled(kernel):
    """Whether the compiler takes the kernel, for a GPU that need not be here."""
    signature = {"source": "*fp32", "result": "*fp32", "SIZE": "constexpr"}
    source = ASTSource(kernel, signature, constexprs={"SIZE": 4})
    return "ttgir" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def interpreted(kernel):
    source, result = torch.arange(4.0), torch.zeros(4)
    try:
        kernel[(1,)](source, result, 4)
    except Exception as error:
        print(f"  {type(error).__name__}: {error}")
        return None
    return result.tolist()


if os.environ.get("TRITON_INTERPRET") == "1":
    first, second = interpreted(constant_first), interpreted(tensor_first)
    print("expected of the interpreter: both give [0.0, 3.0, 6.0, 9.0]")
    print(f"seen: CONSTANT * tensor: {first or 'raised the above'}; tensor * CONSTANT: {second}")
    assert first is None and second == [0.0, 3.0, 6.0, 9.0]
else:
    print("torch", version("torch"), "triton", version("triton"))
    taken = compiled(constant_first), compiled(tensor_first)
    print(f"the compiler takes CONSTANT * tensor: {taken[0]}; tensor * CONSTANT: {taken[1]}")
    assert taken == (True, True)
EOF
cd "$tmp"
export CUDA_VISIBLE_DEVICES='' TRITON_CACHE_DIR="$tmp/cache"
venv/bin/python -W ignore finding.py
TRITON_INTERPRET=1 venv/bin/python -W ignore finding.py
