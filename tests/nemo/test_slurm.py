"""An experiment submitted to a real Slurm. On demand: make test-nemo-slurm."""

import json
import os
import re
import sys
from collections.abc import Callable

import pytest

from tests.e2e.workplace import Done, Workplace, finish, succeed, untimed
from tests.nemo.conftest import Launcher
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import cluster, sglang

__all__ = ["cluster"]
LIMIT_S = 240.0


@pytest.fixture
def submitted(cluster: Cluster, launcher: Launcher) -> Callable[..., Done]:
    """Hand a run of tiny.yaml on two nodes to the cluster."""
    ranks = ("--nodes", "2", "--gpus", "0", "--time", "0:40:00", "--python", sys.executable)

    def submit(*words: str) -> Done:
        configuration = cluster.environment["SLURM_CONF"]
        return finish(launcher.start("slurm", "tiny.yaml", *ranks, *words, SLURM_CONF=configuration))

    return submit


@pytest.mark.slurm
def test_a_job_asked_before_its_time_limit_saves_and_goes_on_in_the_queue(
    cluster: Cluster, submitted: Callable[..., Done], finished: Workplace
) -> None:
    name = "queued 'again'"
    job = number(submitted(f"name={json.dumps(name)}", "launch.threads=1"))
    ask(cluster, finished, name, job, step=1)
    ask(cluster, finished, name, job, step=2)  # Slurm numbers the steps of each attempt anew.
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), LIMIT_S)
    assert cluster.state(job) == "COMPLETED"
    assert untimed(finished.metrics(name)) == untimed(finished.metrics("finished"))
    assert os.readlink(finished.run(name) / "logs" / "latest") == "attempt_2"


def number(done: Done) -> int:
    """Of the job that was submitted."""
    (job,) = re.findall(r"^submitted: slurm\S*/(\d+)$", succeed(done).out, re.MULTILINE)
    return int(job)


def ask(cluster: Cluster, place: Workplace, name: str, job: int, step: int) -> None:
    """Once `step` is done, what Slurm does before the time limit: USR1 for the batch shell."""
    wait_until(lambda: len(place.metrics(name)) > step, LIMIT_S)
    with place.held():
        cluster.call("scancel", "--batch", "--signal=USR1", str(job))
        wait_until(lambda: len(asked(place)) == step, LIMIT_S)


def asked(place: Workplace) -> list[str]:
    """The logs of attempts that were asked to stop."""
    logs = place.root.glob("experiments/*/*/*/log-mtroll.*.out")
    return [log.name for log in logs if "asking the ranks to save and stop" in log.read_text()]


@pytest.mark.slurm
def test_a_node_of_its_own_serves(
    cluster: Cluster, submitted: Callable[..., Done], finished: Workplace
) -> None:
    nodes = ("--nodes", "1", "--tasks", "2", "--serve-nodes", "1")
    job = number(submitted("name=served", "launch.threads=1", *sglang(finished), *nodes))
    wait_until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), LIMIT_S)
    assert cluster.state(job) == "COMPLETED"
    rows = finished.metrics("served")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["servers"] == 1.0


@pytest.mark.slurm
def test_an_unknown_partition_is_sbatchs_to_refuse(submitted: Callable[..., Done]) -> None:
    done = submitted("name=nowhere", "--partition", "nowhere")
    assert done.code == 1
    assert "invalid partition specified: nowhere" in "".join(done.err)
