"""Compile every shipped form of every Triton kernel, without needing a GPU, and inspect the result.

    python tools/check_kernels.py [--arch sm_90]

Prints registers, spilled bytes, shared memory, 128-bit loads and tensor-core instructions of each. Exits with
1 if a kernel spills registers, or reads rows of memory without 128-bit loads.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
import troll_kernels
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from troll_kernels.build import Build

CUOBJDUMP = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDE_LOAD = re.compile(r"\bLDG\.E\.(?:\w+\.)*128\b")
TENSOR_CORE = re.compile(r"\b(?:HGMMA|HMMA|IMMA|QGMMA|UTCHMMA)\b")


@dataclass(frozen=True)
class Machine:
    """Figures of one compiled build; spilled and shared are in bytes."""

    registers: int
    spilled: int
    shared: int
    wide_loads: int
    tensor_core: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--arch", default="sm_90", help="the GPU to compile for, sm_80 or newer")
    arch = int(parser.parse_args().arch.removeprefix("sm_"))
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it, interpreted kernels cannot be compiled")
    print(_line("operation", "form", "registers", "spilled", "shared", "LDG.128", "tensor", ""))
    failures = 0
    for operation in operations():
        for build in importlib.import_module(f"troll_kernels.{operation}.triton_kernel").builds():
            machine = compiled(build, arch)
            wrong = faults(build, machine)
            failures += bool(wrong)
            print(_line(operation, build.label, *vars(machine).values(), "; ".join(wrong)), flush=True)
    print(f"{failures} faulty" if failures else f"no spills, and vector loads everywhere, on sm_{arch}")
    return 1 if failures else 0


def _line(operation: str, form: str, *figures: str | int) -> str:
    *numbers, remark = figures
    return f"{operation:12} {form:24}{''.join(f'{number:>10}' for number in numbers)}  {remark}".rstrip()


def operations() -> list[str]:
    """Every operation that has a Triton kernel."""
    return sorted(path.parent.name for path in Path(troll_kernels.__path__[0]).glob("*/triton_kernel.py"))


def faults(build: Build, machine: Machine) -> list[str]:
    wrong = []
    if machine.spilled:
        wrong.append("SPILLS")
    if build.streams and not machine.wide_loads:
        wrong.append("NO VECTOR LOADS")
    return wrong


def compiled(build: Build, arch: int) -> Machine:
    # Fuse products and sums, as a launch does by default when it compiles.
    options = {"num_warps": build.warps, "enable_fp_fusion": True}
    kernel = triton.compile(_source(build), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        # Triton's own assembler, because another one may be too old for its PTX.
        suffix = "a" if f"sm_{arch}a" in kernel.asm["ptx"] else ""
        assembler = [get_ptxas(arch).path, "-v", f"-arch=sm_{arch}{suffix}", str(ptx), "-o", "/dev/null"]
        log = _output(assembler)
        instructions = _output([str(CUOBJDUMP), "-sass", str(cubin)])
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or spills is None:
        raise RuntimeError(f"{build.label}: ptxas -v reported no registers or spills:\n{log}")
    return Machine(
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        kernel.metadata.shared,
        len(WIDE_LOAD.findall(instructions)),
        len(TENSOR_CORE.findall(instructions)),
    )


def _source(build: Build) -> ASTSource:
    """Source of a build, with what a launch would find: pointers and ALIGNED integers divisible by 16."""
    names = build.kernel.arg_names
    types = {name: kind.removesuffix(":16") for name, kind in build.arguments.items()}
    aligned = {name for name, kind in build.arguments.items() if kind[0] == "*" or kind.endswith(":16")}
    return ASTSource(
        fn=build.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr}")
    return result.stdout + result.stderr


if __name__ == "__main__":
    sys.exit(main())
