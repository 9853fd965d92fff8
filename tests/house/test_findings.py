"""Every finding is listed, stands alone, and says what it installs. They are run by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.markdown import ROOT

FOLDER = ROOT / "findings"
FINDINGS = sorted(FOLDER.glob("*.sh"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def test_the_table_lists_every_finding() -> None:
    listed = re.findall(r"^\| \[`(\S+\.sh)`\]", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.name for path in FINDINGS]
    assert FINDINGS


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_stands_alone_with_pinned_packages(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"\w==\d", text)
    assert "megatron_troll" not in text
    checked = subprocess.run([SHELLCHECK, path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
