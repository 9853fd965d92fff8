"""Training under a real Slurm on two nodes: stopped, preempted, killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.workplace import REPOSITORY, Workplace, succeed, untimed
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import sglang

LIMIT_S = 240.0
SERVED = ("--nodes", "1", "--tasks", "2", "--serve-nodes", "1")


@dataclass(frozen=True)
class Job:
    """A submitted script of `mtroll launch`, its run and its log."""

    cluster: Cluster
    place: Workplace
    name: str
    number: int

    @property
    def log(self) -> str:
        path = self.place.root / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    @property
    def rows(self) -> list[dict]:
        return self.place.metrics(self.name)

    @property
    def attempts(self) -> list[str]:
        return sorted(path.name for path in (self.place.run(self.name) / "logs").glob("attempt_*"))

    def wait_until(self, condition: Callable[[], object]) -> None:
        def met() -> bool:
            assert self.cluster.state(self.number) not in ("FAILED", "CANCELLED"), self.log
            return bool(condition())

        wait_until(met, LIMIT_S)

    def step(self, name: str) -> str:
        """The number of its step of that name."""
        steps = self.cluster.call(
            "squeue", "--noheader", "--steps", f"--jobs={self.number}", "--format=%i %j"
        )
        return next(number for number, its in map(str.split, steps.splitlines()) if its == name)

    def end(self) -> str:
        """The state that it ends in."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.cluster.state(self.number) in ends, LIMIT_S)
        return self.cluster.state(self.number)


@pytest.fixture
def submit(cluster: Cluster, finished: Workplace) -> Iterator[Callable[..., Job]]:
    """Write a script for the run of tiny.yaml under another name, and hand it to sbatch."""
    jobs = []

    def submit(
        name: str, *settings: str, nodes: Sequence[str] = ("--nodes", "2"), sbatch: Sequence[str] = ()
    ) -> Job:
        script = f"{len(name)} {name.split()[0]}.sbatch"
        allocation = ("--slurm", *nodes, "--gpus", "0", "--time", "0:40:00")
        overrides = (f"name={json.dumps(name)}", "launch.threads=1", *settings)
        succeed(
            finished.mtroll(
                "launch",
                "tiny.yaml",
                *overrides,
                *allocation,
                "--python",
                sys.executable,
                "--output",
                script,
            )
        )
        environment = {**cluster.environment, "PYTHONPATH": str(REPOSITORY)}
        said = subprocess.run(
            ["sbatch", "--parsable", *sbatch, script],
            cwd=finished.root,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        jobs.append(Job(cluster, finished, name, int(said.stdout)))
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.call("scancel", "--quiet", str(job.number))


def test_a_job_asked_before_its_time_limit_saves_and_goes_on_in_the_queue(
    submit: Callable[..., Job], finished: Workplace
) -> None:
    job = submit("asked")
    job.wait_until(lambda: len(job.rows) > 2)
    with finished.held():
        job.cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
        job.wait_until(lambda: "asking the ranks to save and stop" in job.log)
    assert job.end() == "COMPLETED", job.log
    assert untimed(job.rows) == untimed(finished.metrics("finished"))
    assert job.attempts == ["attempt_0", "attempt_1"]
    assert os.readlink(finished.run("asked") / "logs" / "latest") == "attempt_1"
    assert not (finished.run("asked") / "stopped").exists()


def test_a_preempted_job_saves_and_comes_back(submit: Callable[..., Job], finished: Workplace) -> None:
    job = submit("preempted")
    job.wait_until(lambda: len(job.rows) > 1)
    urgent = int(
        job.cluster.call(
            *(
                "sbatch",
                "--parsable",
                "-p",
                "high",
                "-N",
                "2",
                "--ntasks-per-node=1",
                "-c",
                "2",
                "-o",
                "/dev/null",
            ),
            *("--wrap", "sleep 1"),
        )
    )
    assert job.end() == "COMPLETED", job.log
    assert job.cluster.state(urgent) == "COMPLETED"
    assert untimed(job.rows) == untimed(finished.metrics("finished"))
    assert len(job.attempts) == 2


def test_a_killed_rank_ends_the_job_and_is_named_last(
    submit: Callable[..., Job], finished: Workplace
) -> None:
    job = submit("killed")
    job.wait_until(lambda: len(job.rows) > 1)
    with finished.held():
        heartbeat = finished.run("killed") / "heartbeat" / "rank_1.json"
        os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
        assert job.end() == "FAILED"
    last = job.log.splitlines()[-1]
    assert last.startswith("rank 1 failed (killed by SIGKILL, as the kernel does when memory runs out): ")
    assert "attempt_0/rank_1.err" in last
    assert job.attempts == ["attempt_0"]


def test_a_second_job_on_a_run_folder_refuses(submit: Callable[..., Job], finished: Workplace) -> None:
    with finished.held():
        first = submit("shared folder, 'quoted' \"twice\"")
        first.wait_until(lambda: (finished.run(first.name) / "heartbeat").exists())
        second = submit(first.name)
        assert second.end() == "FAILED"
        assert "is being written by pid" in second.log.splitlines()[-1]
        first.cluster.call("scancel", str(first.number))
    assert first.end() == "CANCELLED"
    assert first.cluster.state(first.number) == "CANCELLED"
    assert first.attempts == ["attempt_0", "attempt_1"]


def test_the_first_node_serves_and_a_server_that_ends_by_a_preemptions_signal_is_started_again(
    submit: Callable[..., Job], finished: Workplace
) -> None:
    job = submit("served", *sglang(finished), nodes=SERVED)
    servers = finished.run("served") / "servers"

    def pids() -> list[int]:
        return [json.loads(file.read_text())["pid"] for file in servers.glob("*.json")]

    job.wait_until(lambda: len(job.rows) > 1)
    with finished.held():
        first = pids()
        job.cluster.signal_step(job.step("servers"), "TERM")
        job.wait_until(lambda: pids() not in ([], first))
    assert job.end() == "COMPLETED", job.log
    assert [row["step"] for row in job.rows] == [0, 1, 2, 3, 4]
    assert job.rows[0]["servers"] == 1.0
    assert {row.get("servers", 1.0) for row in job.rows} == {1.0}
    assert job.attempts == ["attempt_0"]
    assert list(servers.glob("*.json")) == []


def test_a_port_of_the_servers_that_is_taken_is_told_before_they_start(
    submit: Callable[..., Job], finished: Workplace
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = submit("taken", *sglang(finished), f"serve.port={port}", nodes=SERVED)
        assert job.end() == "FAILED"
    assert re.search(rf"ports: \S+ {port}: .*Address already in use", job.log.splitlines()[-1]), job.log
    assert not (finished.run("taken") / "servers").exists()


def test_a_script_written_for_more_nodes_refuses(submit: Callable[..., Job]) -> None:
    job = submit("cut", sbatch=("--nodes", "1"))
    assert job.end() == "FAILED"
    assert job.log == (
        "the job has 1 nodes of 0 GPUs, and its script is for 2 of 0: write another one with mtroll launch\n"
    )


def test_a_container_without_pyxis_is_told_as_such(submit: Callable[..., Job], finished: Workplace) -> None:
    job = submit("contained", nodes=("--nodes", "2", "--container", "image.sqsh"))
    assert job.end() == "FAILED"
    assert job.log == "--container: srun knows no --container-image: the cluster has no pyxis\n"
    assert not finished.run("contained").exists()


def test_what_the_nodes_lack_is_told_before_any_rank_starts(
    submit: Callable[..., Job], finished: Workplace
) -> None:
    job = submit("wishful", "checkpoint.keep_last=1000000000")
    assert job.end() == "FAILED"
    assert re.search(r"disk: .* GiB free at .*, \d+\.\d needed; free some, lower", job.log.splitlines()[-1])
    assert not job.rows


def test_an_unknown_partition_is_sbatchs_to_refuse(
    cluster: Cluster, finished: Workplace, tmp_path: Path
) -> None:
    options = ("--slurm", "--nodes", "2", "--gpus", "0", "--partition", "nowhere", "--submit")
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    done = finished.mtroll("launch", "tiny.yaml", *options)
    assert done.code == 1
    assert "invalid partition specified: nowhere" in "".join(done.err)
