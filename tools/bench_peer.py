"""Time and memory of an RL step beside TRL's GRPOTrainer, on the same model, prompts and updates.

    tools/environment.sh .venv-trl && .venv-trl/bin/pip install -r tools/peer/requirements.txt
    python tools/bench_peer.py MODEL [--updates 4] [--repeats 5] [--build FOLDER] [--alone] [--json FILE]

MODEL is a Hugging Face folder (tools/smollm2.py and tools/peer/hybrid.py make one). A step generates 8
answers of exactly 32 tokens to 16 prompts of 60 to 100 tokens (uniform; `--lengths`) and trains on them in
micro-batches of equally many tokens. The sides are processes that live as long as the bench and take turns,
one step each, so that other load slows all; a side that waits computes nothing. The first turn of each is a
warm-up. Memory is the peak PSS of a side's processes during its own turns. `--build`: a checkout of another
commit, which trains with TROLL too. `--alone`: without TRL.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_record
import psutil
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[1]
PROMPTS, SAMPLES, TOKENS = 16, 8, 32
LENGTHS = (60, 100)
# Sequences a micro-batch.
SEQUENCES = 16
MEASURES = ("step", "generation", "update")
METHODS = {"PPO-clip": "clip", "TROLL": "troll"}


@dataclass
class Side:
    """One trainer in a process of its own, and the seconds of its turns. peak_mib: of its turns, PSS."""

    name: str
    process: subprocess.Popen[str]
    turns: list[dict[str, float]] = field(default_factory=list)
    peak_mib: float = 0.0

    def answer(self) -> dict[str, Any]:
        """The next JSON line that the process writes. Raises RuntimeError if it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with code {self.process.wait()}")

    def turn(self, counts: bool) -> None:
        """Let it make one step."""
        assert self.answer() == {"ready": True}
        assert self.process.stdin is not None
        with self._watched(counts):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            seconds = self.answer()
        if counts:
            self.turns.append(seconds)
        print(f"{self.name}: " + ", ".join(f"{n} {s:.2f} s" for n, s in seconds.items()), flush=True)

    @contextmanager
    def _watched(self, counts: bool) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            # To count the pages of a process of gigabytes takes a part of a second, and slows it.
            while counts and not ended.wait(1.0):
                self.peak_mib = max(self.peak_mib, pss_mib(self.process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def median(self, measure: str) -> float:
        return statistics.median(turn[measure] for turn in self.turns)


def pss_mib(pid: int) -> float:
    """Memory of a process and its children in MiB; pages that several share are counted by shares."""
    total = 0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with open(f"/proc/{process.pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total / 1024


def prompts_of(
    tokenizer: PreTrainedTokenizerBase, count: int, lengths: tuple[int, int] = LENGTHS
) -> list[str]:
    """Texts of as many tokens, drawn uniformly from both `lengths` on: words that are one token each."""
    chance = random.Random(0)
    words = sorted(
        token[1:]
        for token in tokenizer.get_vocab()
        if token[:1] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
    )
    texts = []
    for _ in range(count):
        length = chance.randint(*lengths)
        texts.append("".join(f" {word}" for word in chance.choices(words, k=length)))
        assert len(tokenizer(texts[-1])["input_ids"]) == length  # pyright: ignore[reportArgumentType]
    return texts


def measure(arguments: argparse.Namespace, folder: Path) -> list[Side]:
    settings = {
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "tokens": TOKENS,
        "updates": arguments.updates,
        "sequences": SEQUENCES,
        "token_budget": SEQUENCES * (sum(arguments.lengths) // 2 + TOKENS),
        "threads": os.cpu_count(),
        "folder": str(folder / "trl"),
    }
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = prompts_of(tokenizer, PROMPTS * (arguments.repeats + 1), tuple(arguments.lengths))
    prompts, wanted = folder / "prompts.json", folder / "settings.json"
    prompts.write_text(json.dumps(texts))
    wanted.write_text(json.dumps(settings))
    files = [str(arguments.model), str(prompts), str(wanted)]
    peer = str(ROOT / ".venv-trl" / "bin" / "python")
    commands = {"TRL, PPO-clip": [peer, str(ROOT / "tools" / "peer" / "trl_grpo.py"), *files]}
    if arguments.alone:
        commands = {}
    if arguments.build is not None:
        commands["another build, TROLL"] = ours(arguments.build.resolve(), files, "troll")
    commands |= {f"ours, {name}": ours(ROOT, files, method) for name, method in METHODS.items()}
    with ExitStack() as running:
        sides = [Side(name, running.enter_context(started(command))) for name, command in commands.items()]
        for turn in range(arguments.repeats + 1):
            for side in sides:
                side.turn(counts=turn > 0)
    return sides


def ours(build: Path, files: Sequence[str], method: str) -> list[str]:
    """Command of a side that runs this project as it stands in the folder `build`."""
    path = f"PYTHONPATH={build}:{build / 'kernels'}"
    return ["env", path, sys.executable, str(build / "tools" / "peer" / "ours.py"), *files, method]


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(os.cpu_count())}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--updates", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs=2, default=LENGTHS, help="fewest and most prompt tokens")
    parser.add_argument("--build", type=Path, default=None)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sides = measure(arguments, Path(folder))
    first = sides[0]
    rows: list[dict[str, Any]] = []
    for side in sides:
        row: dict[str, Any] = {"side": side.name, "updates": arguments.updates, "peak_mib": side.peak_mib}
        for name in MEASURES:
            row |= {
                f"{name}_s": side.median(name),
                f"{name}_of_first": side.median(name) / first.median(name),
            }
        row |= {"memory_of_first": side.peak_mib / first.peak_mib, "turns": side.turns}
        rows.append(row)
        figures = ", ".join(f"{n} {row[f'{n}_s']:.2f} s ({row[f'{n}_of_first']:.2f})" for n in MEASURES)
        memory = f"memory {side.peak_mib:.0f} MiB ({row['memory_of_first']:.2f})"
        print(f"{side.name}: {figures}, {memory}; in brackets, of {first.name}")
    if arguments.json is not None:
        bench_record.write(arguments.json, bench_record.record("cpu", rows, lengths=arguments.lengths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
