"""A run besides its algorithm: processes, folder, metrics, watchdog, signals."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from megatron_troll.config import Config
from megatron_troll.config.load import dump
from megatron_troll.mcore import parallel
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.observe.hang import Watchdog
from megatron_troll.observe.phases import Pace, Phases
from megatron_troll.observe.progress import Progress, Silent, Terminal, open_progress
from megatron_troll.observe.rewind import rewind
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.observe.trackers import Summary, Together, open_trackers, write_summary
from megatron_troll.parallel.groups import Group, Groups
from megatron_troll.system import Interrupts, write_atomic
from megatron_troll.types import Rollout
from megatron_troll.weights.export import save as export


@dataclass
class Session:
    """One rank's view of a running job. `trackers` exists on rank 0 only; `losses` says there what the run's
    records lack."""

    config: Config
    folder: RunFolder
    groups: Groups
    phases: Phases
    progress: Progress
    watchdog: Watchdog
    interrupts: Interrupts
    pace: Pace
    started: float
    trackers: Together | None = field(default=None)
    losses: tuple[str, ...] = ()

    @property
    def world(self) -> Group:
        """All ranks of the job."""
        return self.groups.world

    @property
    def seconds(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self.started

    def begin_at(self, step: int) -> None:
        """Start to log at `step`: metrics that are already there from this step on are set aside, and the
        trackers are opened. Rows that are lost are said. Blocks."""

        def begin() -> None:
            self.losses = rewind(self.folder, step - 1).remarks(self.folder)
            for line in self.losses:
                self.progress.say(f"WARNING: {line}")
            self.trackers = open_trackers(
                self.folder, self.config.observe, self.config.model_dump(by_alias=True), step
            )

        self.world.first(begin)

    def stopping(self) -> bool:
        """Whether any rank was asked to stop. Blocks on all ranks."""
        return self.world.any(torch.tensor(float(self.interrupts.asked), device=parallel.device()))

    def log(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Write the metrics of a finished step, with its time per phase. Blocks."""
        metrics = {**metrics, "seconds": seconds, **self.phases.take()}
        self.world.first(lambda: self.trackers and self.trackers.log(step, metrics))
        self.progress.step(step, metrics, self.pace.eta(step, seconds))

    def complete(self, model: MegatronModel, summary: Summary, ends: Sequence[int]) -> None:
        """Export the model with the ids `ends` as its ends of sequence, write the summary and the report.
        Blocks on all ranks."""
        exported: list[str] = []
        if self.config.checkpoint.export:
            exported = export(model, self.folder.hf, self.config.policy.path, ends=ends)

        def write() -> None:
            # The plotting libraries take a second to import: only the rank that plots waits for them.
            from megatron_troll.observe.report import report
            from megatron_troll.observe.runs import NoMetricsError

            for line in exported:
                self.progress.say(f"{self.folder.hf}: {line}")
            told = (*summary.remarks, *self.losses, *exported)
            write_summary(self.folder.summary, replace(summary, remarks=told))
            try:
                report([self.folder.root], self.folder.report)
            except NoMetricsError as error:
                self.progress.say(f"no report: {error}")

        self.world.first(write)

    def keep_broken(self, step: int, rollouts: Sequence[Rollout], broken: Sequence[int]) -> str:
        """Write the batch of a step with NaN or Inf to broken/step_N.json: ids, log-probs, and which samples
        are at fault. Returns a message that names these samples and the file. Blocks."""
        path = self.folder.root / "broken" / f"step_{step:06d}.json"
        self.world.first(lambda: write_broken(path, rollouts, broken))
        names = ", ".join(rollouts[i].name for i in broken[:5]) or "no single sample"
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        return f"at fault: {names}{more} (the batch is in {path})"


def write_broken(path: Path, rollouts: Sequence[Rollout], broken: Sequence[int]) -> None:
    batch = [
        {
            "sample": rollout.name,
            "at_fault": i in broken,
            "prompt_ids": rollout.prompt_ids.tolist(),
            "response_ids": rollout.response_ids.tolist(),
            "logp": [repr(float(value)) for value in rollout.logp],
        }
        for i, rollout in enumerate(rollouts)
    ]
    write_atomic(path, json.dumps(batch))


class Prepared(Protocol):
    """The validated inputs of a command."""

    @property
    def config(self) -> Config: ...


def of_one_day[Prep: Prepared](task: Prep, world: Group, prepare: Callable[[Config], Prep]) -> Prep:
    """`task`, or if this rank prepared it on another day than rank 0, another one: a chat template may write
    the date. Blocks."""
    day = world.first(lambda: task.config.date)
    return task if task.config.date == day else prepare(task.config.model_copy(update={"date": day}))


@contextmanager
def open_session(
    config: Config, steps: int, interrupts: Interrupts, check: Callable[[], object] = lambda: None
) -> Iterator[Session]:
    """Join the world, lock the run folder, and run the watchdog until the block ends.

    Rank 0 calls `check` before it writes anything but the lock into the folder. An error of `check`, and the
    RunFolderError of a folder that it cannot lock, are raised on every rank.
    """
    with ExitStack() as stack:
        groups = parallel.start(config.policy.layout, config.seed)
        stack.callback(parallel.stop)
        folder = RunFolder.of(config)
        opened = folder.open(dump(config), bool(config.resume), config.accepted, check)
        groups.world.first(lambda: stack.enter_context(opened))
        first = groups.world.rank == 0
        progress: Progress = open_progress(Terminal(), steps, config.name) if first else Silent()
        watchdog = Watchdog(
            folder.heartbeat, groups.world.rank, groups.world.size, config.observe.hang_timeout_s
        )
        stack.enter_context(watchdog)
        stack.enter_context(progress)
        session = Session(
            config=config,
            folder=folder,
            groups=groups,
            phases=Phases(watchdog.phase, progress.phase, synchronize=_synchronise()),
            progress=progress,
            watchdog=watchdog,
            interrupts=interrupts,
            pace=Pace(steps),
            started=time.perf_counter(),
        )
        yield session
        if session.trackers is not None:
            session.trackers.close()


def _synchronise() -> Callable[[], object]:
    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
