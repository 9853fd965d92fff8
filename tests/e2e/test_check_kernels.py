"""Every shipped kernel compiles for the H200 without spilling registers, and reads memory 128 bits at a
time."""

import os
import re
import subprocess
import sys

import pytest

from tests.house.markdown import ROOT


@pytest.fixture(scope="module")
def check():
    """tools/check_kernels.py, imported: it needs Triton."""
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux only")
    import tools.check_kernels

    return tools.check_kernels


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: in this one kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_every_kernel_passes(check):
    result = compiling("tools/check_kernels.py", "--arch", "sm_90")
    assert result.returncode == 0, result.stdout + result.stderr
    found = {name: len(re.findall(rf"^{name} ", result.stdout, re.M)) for name in check.operations()}
    entries = {"hidden_grad", "logits_at", "weight_grad", "sparsify", "project"}
    assert set(found) == entries | {"rows", "topk", "logits_grad"}
    assert all(forms >= 2 for forms in found.values())


@pytest.mark.parametrize(
    ("spilled", "wide_loads", "streams", "faults"),
    [
        (0, 4, True, []),
        (0, 0, False, []),
        (8, 4, True, ["SPILLS"]),
        (0, 0, True, ["NO VECTOR LOADS"]),
    ],
)
def test_what_counts_as_a_fault(check, spilled, wide_loads, streams, faults):
    build = check.Build("", None, {}, {}, 4, streams)
    assert check.faults(build, check.Machine(40, spilled, 0, wide_loads, 0)) == faults


UNALIGNED = """
from dataclasses import replace
from tools.check_kernels import compiled, faults
from troll_kernels.hidden_grad.triton_kernel import builds

aligned = builds()[0]
arguments = {name: kind.removesuffix(":16") for name, kind in aligned.arguments.items()}
print(faults(aligned, compiled(replace(aligned, arguments=arguments), 90)))
"""


def test_rows_that_are_not_aligned_have_no_vector_loads(check):
    """The figures come from the compiled code: take away what vector loads need, and they go."""
    assert compiling("-c", UNALIGNED).stdout.strip() == "['NO VECTOR LOADS']"
