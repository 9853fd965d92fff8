"""A real Slurm cluster of virtual nodes on this machine, without systemd, in one folder."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_troll.launch.ports import free_port

LIMIT_S = 60.0
# Preempted jobs have GRACE_S to save. cred_expire bounds how long a requeued job waits.
GRACE_S = 60
CONFIG = """
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=10000,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=600
JobRequeue=1
MailProg=/bin/true
PropagateResourceLimits=NONE
PlugStackConfig={root}/plugstack.conf
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000\n"
PARTITIONS = """
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Cluster:
    """`nodes` virtual nodes of two cores. Commands of Slurm need `environment`."""

    root: Path
    nodes: int = 2

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self) -> None:
        """Blocks until every node takes jobs."""
        self._write()
        self._start_munge()
        self.call("slurmctld", "-c")
        for name in self._names:
            self.call("slurmd", "-N", name)
        wait_until(
            lambda: self.call("sinfo", "-h", "-N", "-t", "idle", "-p", "batch").count("\n") == self.nodes
        )

    def stop(self) -> None:
        """Ends its jobs, then its daemons, by their pids."""
        self.call("scancel", "--state=RUNNING", "--state=PENDING")
        pids = [
            path for name in ("slurmd.*", "slurmctld", "munged") for path in self.root.glob(f"{name}.pid")
        ]
        for number in [int(path.read_text()) for path in pids]:
            end(number)

    def call(self, *command: str) -> str:
        """The stdout of a command of Slurm, which must succeed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def signal_step(self, step: str, name: str) -> None:
        """Slurm 22.05 signals a step, and says `Invalid job id` where it is not on every node of its job."""
        command = ["scancel", f"--signal={name}", step]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0 or "Invalid job id" in done.stderr, done.stderr

    def state(self, job: int) -> str:
        """RUNNING, COMPLETED, and so on."""
        shown = self.call("scontrol", "show", "job", "-o", str(job))
        return shown.split(" JobState=")[1].split()[0]

    @property
    def _names(self) -> list[str]:
        return [f"vn{number}" for number in range(self.nodes)]

    def _write(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = set[int]()
        while len(ports) < self.nodes + 1:
            ports.add(free_port())
        text = CONFIG.format(host=host, user="root", root=self.root, port=ports.pop())
        for name, port in zip(self._names, ports):
            text += NODE.format(name=name, host=host, port=port)
            (self.root / f"spool.{name}").mkdir()
        (self.root / "state").mkdir()
        (self.root / "plugstack.conf").touch()
        (self.root / "slurm.conf").write_text(text + PARTITIONS.format(grace=GRACE_S))

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        folder.mkdir(mode=0o711)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.call(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={folder}/socket",
            f"--pid-file={self.root}/munged.pid",
            f"--log-file={folder}/log",
            f"--seed-file={folder}/seed",
        )


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, 15)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.1)
