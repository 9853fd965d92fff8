"""The short form of tools/endure.py: killed and damaged runs end like those that nothing happened to."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.workplace import REPOSITORY, Workplace

TRIALS = ("--kills", "2", "--damages", "2", "--inputs", "1", "--disks", "0")


def test_nothing_is_wrong_and_no_process_is_left(warm: Workplace, tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    shutil.copytree(warm.run("demo"), bench / "runs" / "demo")
    shutil.copytree(warm.run("demo") / "data", bench / "data")
    shutil.copytree(warm.run("demo-warm-start"), bench / "runs" / "warm")
    command = [sys.executable, REPOSITORY / "tools" / "endure.py", bench, *TRIALS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted["kill"] == {"equal": 2}
    assert counted["input"] == {"refused": 1}
    assert sum(counted["damage"].values()) == 2
    assert "wrong" not in counted["damage"]
    # Not /dev/shm, where other tests may be at work.
    trials = [json.loads(line) for line in (bench / "endure.jsonl").read_text().splitlines()]
    assert not [left for trial in trials for left in trial["left"] if not left.startswith("/dev/shm")]
