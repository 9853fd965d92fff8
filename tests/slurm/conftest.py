"""A cluster for the session, and the demo task of the end-to-end tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import demo, finished, warm
from tests.slurm.cluster import Cluster

__all__ = ["demo", "finished", "warm"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Its folder has a short name: the path of a socket is limited to 107 bytes."""
    for program in ("slurmctld", "slurmd", "munged"):
        assert shutil.which(program), f"{program} is not installed: make test-slurm installs it"
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
