"""Without a GPU, megatron.core is imported without the compiler."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
from megatron_troll.mcore.cpu.eager import import_megatron
real = torch.compile
import_megatron()
assert torch.compile is real
from megatron.core.fusions import fused_bias_swiglu
print(type(fused_bias_swiglu.swiglu).__name__, "torch._inductor.compile_fx" in sys.modules)
"""


def test_nothing_is_compiled_and_the_compiler_is_not_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["function", "False"]
