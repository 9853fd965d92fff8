"""The script of a job: what is asked of Slurm, what each rank runs, and that the shell reads it as meant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import load
from megatron_troll.launch.slurm.script import (
    Allocation,
    check,
    check_servers,
    seconds_of,
    write,
)

EXAMPLE = Path(__file__).parents[4] / "examples" / "configs" / "cpu_troll.yaml"
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))
AWKWARD = 'it\'s a "job"; $(touch hacked) `x` \\ *'


def config(*overrides: str) -> Config:
    return load(EXAMPLE, overrides)


def head(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def run_head(script: str, tail: str, folder: Path) -> str:
    """What `tail` says after the script's variables are set."""
    variables = script.split("\nset -euo")[0]
    done = subprocess.run(["bash", "-uc", f"{variables}\n{tail}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_a_gpu_and_a_warning_before_the_time_limit() -> None:
    script = write(config(), "c.yaml", [], Allocation(nodes=2, time="1:00:00", notice_s=300, account="lab"))
    assert head(script) == [
        "--job-name=cpu-troll",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--time=1:00:00",
        "--account=lab",
        "--signal=B:USR1@300",
        "--open-mode=append",
        "--output=slurm-%j.log",
        "--requeue",
    ]


def test_bash_and_shellcheck_have_nothing_against_it(tmp_path: Path) -> None:
    allocation = Allocation(nodes=2, container="/images/a b.sqsh", mounts=("/data:/data",), interface="ib0")
    path = tmp_path / "job.sbatch"
    path.write_text(write(config(f"name={json.dumps(AWKWARD)}"), AWKWARD, [f"runs={AWKWARD}"], allocation))
    for command in (["bash", "-n"], [SHELLCHECK, "--exclude=SC2016"]):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_words_reach_the_ranks_as_they_were_given(tmp_path: Path) -> None:
    script = write(config(), f"{AWKWARD}.yaml", [f"name={AWKWARD}"], Allocation(nodes=1))
    said = run_head(script, "printf '%s\\n' \"${command[@]}\"", tmp_path)
    assert said.splitlines() == ["train", f"{AWKWARD}.yaml", f"name={AWKWARD}", "resume=true"]
    assert list(tmp_path.iterdir()) == []


def test_a_container_sees_the_working_folder(tmp_path: Path) -> None:
    allocation = Allocation(nodes=1, container="/images/a b.sqsh", mounts=("/my $data:/data", "/x:/x"))
    said = run_head(write(config(), "c.yaml", [], allocation), "printf '%s\\n' \"${container[@]}\"", tmp_path)
    assert said.splitlines() == [
        "--container-image=/images/a b.sqsh",
        f"--container-mounts={tmp_path}:{tmp_path},/my $data:/data,/x:/x",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
    ]


def test_an_allocation_that_does_not_hold_the_layout_is_refused() -> None:
    layout = config("models.policy.layout={tp: 4, pp: 3, ep: 4}")
    with pytest.raises(
        ConfigError, match=r"1 nodes of 8 ranks: models.policy: .* divisible by tp x pp x cp = 12"
    ):
        check(layout, Allocation(nodes=1))
    check(layout, Allocation(nodes=3))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        *(("30", 1800), ("30:15", 1815), ("1:00:00", 3600), ("2-3", 183600), ("1-0:30", 88200)),
        *(("1-1:01:01", 90061), ("0", None), ("UNLIMITED", None), ("soon", None)),
    ],
)
def test_a_limit_is_read_as_sbatch_reads_it(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (Allocation(nodes=1, time="10:00"), r"--notice-s 600: .* --time 10:00 is 600 s"),
        (Allocation(nodes=1, mounts=("/a:/a",)), r"--mounts /a:/a: SOURCE:TARGET, of a --container"),
        (Allocation(nodes=1, mounts=("/a",), container="i"), r"--mounts /a: SOURCE:TARGET"),
        (Allocation(nodes=1, partition="a\nb"), r"partition: 'a\\nb' has a character"),
    ],
)
def test_options_that_sbatch_would_misread_are_refused(allocation: Allocation, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(config(), "c.yaml", [], allocation)


@pytest.mark.parametrize(("container", "image"), [("/a b.sqsh", "/a b.sqsh"), ("nvcr.io#lab/image", "")])
def test_an_image_that_is_a_file_has_to_be_there(container: str, image: str, tmp_path: Path) -> None:
    script = write(config(), "c.yaml", [], Allocation(nodes=1, container=container))
    assert run_head(script, 'echo "$image"', tmp_path) == f"{image}\n"


@pytest.mark.parametrize(
    ("job", "srun", "said"),
    [
        (("1", "8"), "--container-image", "the job has 1 nodes of 8 GPUs, and its script is for 2 of 8: "),
        (("2", "4"), "--container-image", "the job has 2 nodes of 4 GPUs, and its script is for 2 of 8: "),
        (("2", "8"), "--container", "--container: srun knows no --container-image: the cluster has no pyxis"),
        (("2", "8"), "--container-image", "--container: /a 'b'.sqsh is not there"),
    ],
)
def test_a_job_that_is_not_the_scripts_ends_at_once(
    job: tuple[str, str], srun: str, said: str, tmp_path: Path
) -> None:
    fake = tmp_path / "srun"
    fake.write_text(f"#!/bin/sh\necho '{srun}=IMAGE'\n")
    fake.chmod(0o755)
    script = write(config(), "c.yaml", [], Allocation(nodes=2, container="/a 'b'.sqsh"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    environment |= dict(zip(("SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"), job))
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(said)
    assert list(tmp_path.iterdir()) == [fake]


SERVED = ("rollout.engine=sglang", "rollout.sglang.api_key_file=key")


def test_the_first_nodes_serve_and_the_others_train(tmp_path: Path) -> None:
    script = write(config(*SERVED), "c.yaml", [], Allocation(nodes=2, serve_nodes=3))
    assert "--nodes=5" in head(script)
    said = run_head(script, 'echo "$first $nodes $ranks ${serving[*]}"', tmp_path)
    assert said == "3 2 16 --relative=0 --nodes=3 --ntasks=3 --ntasks-per-node=1\n"


def test_colocated_servers_share_the_nodes_that_train(tmp_path: Path) -> None:
    colocated = config(*SERVED, "rollout.sglang.colocated=true")
    script = write(colocated, "c.yaml", [], Allocation(nodes=2))
    assert "--nodes=2" in head(script)
    said = run_head(script, 'echo "$first $nodes $ranks ${serving[*]}"', tmp_path)
    assert said == "0 2 16 --overlap --relative=0 --nodes=2 --ntasks=2 --ntasks-per-node=1\n"


def test_servers_that_are_elsewhere_are_no_part_of_the_job(tmp_path: Path) -> None:
    elsewhere = config("rollout.engine=sglang", "rollout.sglang.servers=[http://10.0.0.1:30000]")
    said = run_head(write(elsewhere, "c.yaml", [], Allocation(nodes=2)), 'echo "${#serving[@]}"', tmp_path)
    assert said == "0\n"


@pytest.mark.parametrize("where", [("--serve-nodes", 1), ("rollout.sglang.colocated=true", 0)])
def test_servers_have_to_fit_a_node_that_serves(where: tuple[str, int]) -> None:
    setting, serve_nodes = where
    shared = (*SERVED, setting) if "=" in setting else SERVED
    allocation = Allocation(nodes=1, serve_nodes=serve_nodes, gpus=8)
    check_servers(config(*shared, "serve={servers: 4, tp: 2}"), allocation)
    message = r"serve.servers=3 x serve.tp=4 = 12 GPUs of each node that serves, which has 8 \(--gpus\): set "
    with pytest.raises(ConfigError, match=message + "serve.servers to at most 2, or lower serve.tp"):
        check_servers(config(*shared, "serve={servers: 3, tp: 4}"), allocation)
    with pytest.raises(ConfigError, match=r"= 16 GPUs .* which has 8 .*: lower serve.tp"):
        check_servers(config(*shared, "serve={servers: 1, tp: 16}"), allocation)
    check_servers(
        config(*shared, "serve={servers: 3, tp: 4}"), Allocation(nodes=1, gpus=0, serve_nodes=serve_nodes)
    )


@pytest.mark.parametrize(
    ("overrides", "serve_nodes", "message"),
    [
        ((), 1, "--serve-nodes 1: rollout.engine=inprocess uses no servers"),
        (SERVED, 0, "rollout.engine=sglang: nobody serves; give --serve-nodes"),
        (SERVED[:1], 1, "rollout.sglang.api_key_file: missing"),
        ((*SERVED, "rollout.sglang.colocated=true"), 1, "already says where the servers are"),
        ((*SERVED, "rollout.sglang.router=http://10.0.0.1:30000"), 1, "already says where the servers are"),
    ],
)
def test_servers_that_nobody_asks_or_nobody_starts_are_refused(
    overrides: tuple[str, ...], serve_nodes: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_servers(config(*overrides), Allocation(nodes=1, serve_nodes=serve_nodes))


@pytest.mark.parametrize(("written", "code"), [("echo 75 >$1/exit_code", 75), (":", 143)])
def test_the_job_ends_with_the_code_of_the_rank_that_failed_first(
    written: str, code: int, tmp_path: Path
) -> None:
    """Slurm ends the other tasks, and srun's code is theirs."""
    ranks = (
        f'say() {{ mkdir -p "$1/failed"; {written}; echo "rank 1 failed" >"$1/failed/1_rank_1"; exit 143; }}'
    )
    arguments = 'for a; do case $a in */preflight) exit 0 ;; */attempt_0) say "$a" ;; esac; done'
    programs = {"srun": f"{ranks}\n{arguments}", "squeue": ":", "scontrol": "echo ' JobState=RUNNING'"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = write(config(), "c.yaml", [], Allocation(nodes=1, gpus=0, tasks=2))
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "rank 1 failed"
