"""Why a rank ended reaches the launcher from a full disk too, and output without a reader ends nothing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.launch.local import launch
from megatron_troll.system import naming, write_atomic

FULL = "import sys; sys.stderr = open('/dev/full', 'w'); from megatron_troll.system import last_words; "
SHOW = """
from megatron_troll.observe.progress import Terminal, show
for i in range(20000):
    show(Terminal(), f"line {i}")
"""


def test_last_words_on_a_full_disk_are_shown_by_the_launcher(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = FULL + "last_words('disk is full: runs/x\\nstep 3 is whole'); last_words('later'); sys.exit(1)"
    assert launch([sys.executable, "-c", program], 1, 1, tmp_path) == 1
    assert (tmp_path / "rank_0.err").read_bytes() == b""
    assert capfd.readouterr().err.splitlines() == [
        "disk is full: runs/x",
        "step 3 is whole",
        "rank 0 failed (exit code 1): step 3 is whole",
    ]


def test_last_words_that_are_in_the_log_are_shown_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; from megatron_troll.system import last_words; last_words('why'); sys.exit(1)"
    assert launch([sys.executable, "-c", program], 1, 1, tmp_path) == 1
    assert capfd.readouterr().err.splitlines() == ["why", "rank 0 failed (exit code 1): why"]


@pytest.mark.parametrize("output", ["/dev/full", "pipe"])
def test_output_that_cannot_be_written_ends_nothing(output: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(output, "w") if output != "pipe" else os.fdopen(writer, "w") as stdout:
        command = [sys.executable, "-c", SHOW]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr.startswith("nothing is printed any longer: [Errno ")
    assert done.stderr.count("\n") == 1


def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, naming(tmp_path / "metrics.jsonl"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    with pytest.raises(FileNotFoundError) as found, naming(tmp_path):
        (tmp_path / "missing").read_bytes()
    assert found.value.filename == str(tmp_path / "missing")


def test_a_part_that_could_not_be_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_atomic(tmp_path / "file", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
