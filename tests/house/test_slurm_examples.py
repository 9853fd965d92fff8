"""examples/slurm is what `mtroll launch` writes today, and good shell."""

import subprocess
import sys
from pathlib import Path

from tools import slurm_examples

SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))


def test_the_scripts_are_those_that_launch_writes() -> None:
    written = {path: path.read_text() for path in slurm_examples.FOLDER.glob("*.sbatch")}
    assert written == slurm_examples.scripts(), "run tools/slurm_examples.py"


def test_bash_and_shellcheck_have_nothing_against_them() -> None:
    files = sorted(map(str, slurm_examples.FOLDER.glob("*.sbatch")))
    assert files
    for command in (["bash", "-n"], [SHELLCHECK]):
        for file in files:
            done = subprocess.run([*command, file], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
