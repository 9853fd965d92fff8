"""examples/nemo_run/launch.py as a user starts it, in nemo-run's own environment."""

import os
import subprocess
from dataclasses import dataclass

import pytest

from tests.e2e.conftest import demo, finished, warm
from tests.e2e.workplace import REPOSITORY, Workplace

__all__ = ["demo", "finished", "warm"]

PYTHON = REPOSITORY / ".venv-nemo" / "bin" / "python"
LAUNCH = REPOSITORY / "examples" / "nemo_run" / "launch.py"


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    assert PYTHON.exists(), "nemo-run is not installed: make nemo-env"


@dataclass(frozen=True)
class Launcher:
    """Experiments of runs in `place`; experiments lie in place/experiments."""

    place: Workplace

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Run rank 0's words go to stdout, under nemo-run's own."""
        own = {"NEMORUN_HOME": str(self.place.root), "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(
            [PYTHON, LAUNCH, *arguments],
            cwd=self.place.root,
            env={**os.environ, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def launcher(finished: Workplace) -> Launcher:
    return Launcher(finished)
