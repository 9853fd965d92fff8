"""A task of srun becomes a rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.launch.slurm.task import Seat, join, tasks_of_nodes, write_first

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_CPUS_PER_TASK": "12",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}


@pytest.mark.parametrize(
    ("text", "tasks"), [("8", [8]), ("8(x2)", [8, 8]), ("2(x3),1", [2, 2, 2, 1]), ("4,2", [4, 2])]
)
def test_tasks_of_nodes(text: str, tasks: list[int]) -> None:
    assert tasks_of_nodes(text) == tasks


def test_a_seat_is_read_from_slurms_environment() -> None:
    seat = Seat(rank=5, world=6, local_rank=1, local_world=2, threads=12, launcher="127.0.0.1")
    assert Seat.of(SLURM) == seat


def test_outside_srun_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"SLURM_PROCID, SLURM_LAUNCH_NODE_IPADDR not set: .* srun"):
        Seat.of({})


def test_ranks_agree_on_where_they_meet(tmp_path: Path) -> None:
    first = Seat.of(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    one, other = (join(seat, tmp_path, None) for seat in (first, Seat.of(SLURM)))
    assert (one["MASTER_ADDR"], one["MASTER_PORT"]) == (other["MASTER_ADDR"], other["MASTER_PORT"])
    assert (one["RANK"], one["LOCAL_WORLD_SIZE"], other["RANK"], other["LOCAL_WORLD_SIZE"]) == (
        *("0", "4"),
        *("5", "2"),
    )
    assert other["OMP_NUM_THREADS"] == "12"


def test_a_rank_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    environment = os.environ | SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    task = [sys.executable, "-m", "megatron_troll.launch.slurm.task", str(tmp_path)]
    done = subprocess.run([*task, "report", "nothing"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (reason,) = (tmp_path / "failed").iterdir()
    assert reason.name.endswith("_rank_0")
    assert reason.read_text().startswith("rank 0 failed (exit code 2): nothing")
    assert (tmp_path / "exit_code").read_text() == "2\n"
    assert json.loads((tmp_path / "meeting.json").read_text())["address"] == "127.0.0.1"


def test_the_exit_code_of_the_first_failure_stays(tmp_path: Path) -> None:
    write_first(tmp_path / "exit_code", "75\n")
    write_first(tmp_path / "exit_code", "143\n")
    assert (tmp_path / "exit_code").read_text() == "75\n"
