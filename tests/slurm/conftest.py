"""A cluster for the session, and the demo task of the end-to-end tests."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_troll.launch.ports import free_port
from tests.e2e.conftest import demo, finished, warm
from tests.e2e.workplace import REPOSITORY, Workplace
from tests.slurm.cluster import Cluster

__all__ = ["demo", "finished", "warm"]
SGLANG_PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"


def sglang(place: Workplace) -> tuple[str, str]:
    """What makes a run of tiny.yaml ask a server of its own job."""
    key = place.root / "key"
    key.touch(mode=0o600)
    key.write_text("not-for-others")
    asked = f"{{api_key_file: {key}, deadline_s: 20, probe: {{prompts: 2}}}}"
    return (
        f"rollout={{engine: sglang, sglang: {asked}}}",
        f"serve={{python: {SGLANG_PYTHON}, port: {free_port()}, device: cpu}}",
    )


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
