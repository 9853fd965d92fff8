"""examples/slurm is what `mtroll launch` writes today, and good shell."""

import subprocess
import sys
from pathlib import Path

from tools import slurm_examples

SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))


def test_the_folder_is_what_launch_writes() -> None:
    written = {path: path.read_text() for path in slurm_examples.FOLDER.iterdir()}
    assert written == slurm_examples.files(), "run tools/slurm_examples.py"


def test_bash_and_shellcheck_have_nothing_against_any_script(tmp_path: Path) -> None:
    files = []
    for name, job in slurm_examples.jobs().items():
        (tmp_path / name).write_text(slurm_examples.script(job))
        files.append(str(tmp_path / name))
    assert len(files) == 8
    for command in (["bash", "-n"], [SHELLCHECK]):
        for file in files:
            done = subprocess.run([*command, file], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
