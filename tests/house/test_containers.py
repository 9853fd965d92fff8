"""The container files are what hadolint calls good, and end as a user without rights."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.markdown import ROOT

HADOLINT = str(Path(sys.executable).with_name("hadolint"))
each = pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])


@each
def test_hadolint_has_nothing_against_it(name: str) -> None:
    done = subprocess.run([HADOLINT, str(ROOT / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_it_ends_without_rights(name: str) -> None:
    last = (ROOT / name).read_text().rsplit("\nFROM ", 1)[1]
    assert "\nUSER 10001\n" in last
