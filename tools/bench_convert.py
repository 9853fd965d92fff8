"""Measure `mtroll convert` on a synthetic Qwen3-MoE: speed against a plain copy, memory, and kills.

python tools/bench_convert.py [--folder runs/bench-convert] [--gib 4] [--kills 10] [--json FILE]

The model has the widths of Qwen3-30B-A3B and as many layers as --gib needs. Before each measurement the input
files are dropped from the page cache; a measurement ends when everything is on disk. Memory is the peak of a
process, above what it held when the conversion began and in total. Then each direction is killed with SIGKILL
--kills times at random moments and resumed, and no finished file may change.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_troll.convert.plan import Conversion, Options
from megatron_troll.convert.progress import NoProgress
from megatron_troll.convert.run import convert
from megatron_troll.convert.to_hugging_face import ToHuggingFace
from megatron_troll.convert.to_megatron import ToMegatron
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import ALONE
from megatron_troll.system import flush
from megatron_troll.weights.families import table_of
from megatron_troll.weights.folder import file_name, write_index
from megatron_troll.weights.source import FolderSource
from megatron_troll.weights.tensor_file import TensorFileWriter, as_bytes

WIDTHS = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
# The subfolders that each direction reads and writes.
DIRECTIONS = {"hf2mcore": ("hf", "mcore"), "mcore2hf": ("mcore", "back")}
GIB = 2**30
OPTIONS = Options(shard_bytes=GIB // 16)


@dataclass(frozen=True)
class Measured:
    """Figures of one conversion: GiB of its input, seconds of the conversion and of the plain copy; peak
    memory in GiB, above what the process held when the conversion began and in total."""

    gib: float
    seconds: float
    copy_seconds: float
    peak_above_begin: float
    peak: float

    def __str__(self) -> str:
        speed, copied = self.gib / self.seconds, self.gib / self.copy_seconds
        return (
            f"{self.gib:.2f} GiB, {speed * 1024:.0f} MiB/s; plain copy {copied * 1024:.0f} MiB/s; "
            f"ratio {speed / copied:.2f}; peak memory {self.peak_above_begin:.2f} GiB above the beginning, "
            f"{self.peak:.2f} GiB in all"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-convert"))
    parser.add_argument("--gib", type=float, default=4.0, help="least size of the model in GiB (default: 4)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.folder, *arguments.child)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    write_model(arguments.folder / "hf", arguments.gib)
    report = {}
    for direction in DIRECTIONS:
        measured = measure(arguments.folder, direction)
        print(f"{direction}: {measured}")
        report[direction] = asdict(measured)
    compare(arguments.folder)
    for direction in DIRECTIONS:
        finished = kill(arguments.folder, direction, arguments.kills, report[direction]["seconds"])
        print(f"{direction}: killed {arguments.kills} times, with {finished} finished files; none was redone")
        report[direction]["finished_at_kills"] = finished
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def write_model(folder: Path, gib: float) -> None:
    """Write a model of at least `gib` GiB: random bf16 bits, in files of about 1 GiB."""
    layers = 1
    while True:
        config = WIDTHS | {"num_hidden_layers": layers}
        tensors = list(table_of(shape_of(config)).tensors().items())
        if 2 * sum(torch.Size(tensor.shape).numel() for _, tensor in tensors) >= gib * GIB:
            break
        layers += 1
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    files = [tensors[i::layers] for i in range(layers)]
    generator = torch.Generator().manual_seed(0)
    for i, own in enumerate(files):
        with open(folder / file_name(i, layers), "wb") as file:
            writer = TensorFileWriter(file, {name: (torch.bfloat16, tensor.shape) for name, tensor in own})
            for name, tensor in own:
                bits = torch.randint(-(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator)
                writer.write(name, bits.view(torch.bfloat16))
        flush(folder / file_name(i, layers))
    write_index(folder, [[name for name, _ in own] for own in files], 0)


def measure(folder: Path, direction: str) -> Measured:
    source = folder / DIRECTIONS[direction][0]
    copied = plain_copy(source, folder / "copy")
    drop_from_cache(source)
    process = start(folder, direction, folder / DIRECTIONS[direction][1])
    out, _ = process.communicate()
    assert process.returncode == 0
    seconds, before, peak = json.loads(out.splitlines()[-1])
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    return Measured(size / GIB, seconds, copied, (peak - before) / GIB, peak / GIB)


def plain_copy(source: Path, target: Path) -> float:
    """Seconds until every file of a folder is copied and on disk."""
    drop_from_cache(source)
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        flush(path)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(folder: Path, direction: str, target: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, __file__, "--folder", str(folder), "--child", direction, str(target)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def child(folder: Path, direction: str, target: str) -> None:
    """Convert. Prints a line at the start; at the end seconds, and bytes of memory before and at the peak."""
    source = folder / DIRECTIONS[direction][0]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    print("begins", flush=True)
    began = time.perf_counter()
    conversion: Conversion
    if direction == "hf2mcore":
        conversion = ToMegatron(source, OPTIONS)
    else:
        conversion = ToHuggingFace(source, source, OPTIONS)
    assert convert(conversion, Path(target), ALONE, NoProgress())
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def compare(folder: Path) -> None:
    """Assert that the model converted back equals the original bit for bit."""
    there, back = FolderSource(folder / "hf"), FolderSource(folder / "back")
    assert there.shapes == back.shapes
    for name in there.shapes:
        assert as_bytes(there.read(name)) == as_bytes(back.read(name)), name


def kill(folder: Path, direction: str, kills: int, seconds: float) -> list[int]:
    """Kill and resume a conversion; return the number of finished files at each kill. A kill comes in the
    middle of a file, after one more is finished. `seconds`: duration of the whole conversion."""
    target = folder / "killed"
    draw, finished, counts = random.Random(0), set(), []
    for _ in range(kills):
        process = start(folder, direction, target)
        assert process.stdout is not None
        process.stdout.readline()
        while files_with_tensors(folder / ".killed.part") <= finished:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2 * seconds / kills))
        assert process.poll() is None, "the conversion was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = files_with_tensors(folder / ".killed.part")
        assert finished <= found, "a finished file was written again"
        finished = found
        counts.append(len(found))
    process = start(folder, direction, target)
    process.communicate()
    assert process.returncode == 0
    assert finished <= files_with_tensors(target), "a finished file was written again"
    assert sums(target) == sums(folder / DIRECTIONS[direction][1])
    shutil.rmtree(target)
    return counts


def files_with_tensors(folder: Path) -> set[tuple[str, int, int]]:
    """Name, inode and modification time of every file with tensors."""
    return {
        (str(path.relative_to(folder)), path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in (".distcp", ".safetensors")
    }


def sums(folder: Path) -> set[str]:
    """Checksum lines of the files with tensors."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {line for line in lines if line.endswith((".distcp", ".safetensors"))}


if __name__ == "__main__":
    main()
