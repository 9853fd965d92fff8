"""Running a study: its warm starts, then every unfinished run, a few at a time."""

import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import dump
from megatron_troll.data.dates import folder_writes_date
from megatron_troll.data.demo import write_demo
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.study.jobs import Ended, Job, run_jobs
from megatron_troll.study.plan import Cell, StudyPlan
from megatron_troll.study.results import add, as_planned, beside, finished, gather, result_of
from megatron_troll.system import Interrupts, write_atomic


def run_study(
    plan: StudyPlan, results: Path, at_once: int, interrupts: Interrupts, say: Callable[[str], None]
) -> bool:
    """Run a study to the end; a restarted study continues where it stopped. Every finished run is added to
    the file `results`; a run found there is not repeated, even if its folder is gone. Returns whether all
    runs are finished: False if asked to stop or if a run failed. Blocks. Raises ConfigError if a folder that
    it needs has a run of another configuration.
    """
    found = gather(plan, results)
    missing = [cell for cell in plan.cells() if cell not in found]
    seeds = sorted({cell.seed for cell in missing if not prepared(plan, cell.seed)})
    for cell in missing:
        _check(plan.folder(cell), plan.config(cell))
    for seed in seeds:
        for name in plan.warm_starts():
            _check(plan.of_seed(seed) / name, plan.warm_start(seed, name))
    _run([job for seed in seeds for job in warm_starts(plan, seed)], at_once, interrupts, say)
    jobs = {training(plan, cell): cell for cell in missing if prepared(plan, cell.seed)}

    def record(job: Job) -> None:
        if finished(plan, cell := jobs[job]):
            found[cell] = result_of(plan, cell)
            add(results, found[cell])

    _run(list(jobs), at_once, interrupts, say, record)
    return all(cell in found for cell in plan.cells())


def prepared(plan: StudyPlan, seed: int) -> bool:
    """Whether the warm starts of the seed are finished."""
    return all(_warm(plan, seed, name) for name in plan.warm_starts())


def _warm(plan: StudyPlan, seed: int, name: str) -> bool:
    folder = RunFolder(plan.of_seed(seed) / name)
    return folder.summary.exists() and as_planned(folder.root, plan.warm_start(seed, name))


def _check(folder: Path, config: Config) -> None:
    if folder.exists() and not as_planned(folder, config):
        raise ConfigError(
            f"{folder} was started with another configuration than the study gives it now: move it away, or "
            "give the study another name"
        )


def day_of(plan: StudyPlan) -> str:
    """The day that chat templates write in every run of the study: that of a run which is there, or today."""
    warm = (plan.of_seed(seed) / name for seed in plan.study.seeds for name in plan.warm_starts())
    folders = (*warm, *map(plan.folder, plan.cells()))
    return next(filter(None, (RunFolder(folder).date() for folder in folders)), date.today().isoformat())


def warm_starts(plan: StudyPlan, seed: int) -> list[Job]:
    """Jobs for the missing warm starts of a seed. Writes the seed's demo task. Deletes an unfinished warm
    start, because none is resumed."""
    folder, jobs = plan.of_seed(seed), []
    write_demo(folder / "demo", seed)
    for name in plan.warm_starts():
        if _warm(plan, seed, name):
            continue
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        said = f"{name.replace('-', ' ')} of seed {seed}"
        config = plan.warm_start(seed, name)
        jobs.append(_job("sft", said, config, folder / name, *_day(plan, config, folder / name)))
    return jobs


def training(plan: StudyPlan, cell: Cell) -> Job:
    config, folder = plan.config(cell), plan.folder(cell)
    return _job("train", str(cell), config, folder, "resume=true", *_day(plan, config, folder))


def _day(plan: StudyPlan, config: Config, folder: Path) -> list[str]:
    """The override with which a new run writes the day of the study, if its chat template writes one."""
    if config.date is not None or RunFolder(folder).holds_run():
        return []
    return [f"date={day_of(plan)}"] if folder_writes_date(Path(config.policy.path)) else []


def _job(command: str, name: str, config: Config, folder: Path, *overrides: str) -> Job:
    """Job `mtroll <command>` with a configuration, which is written beside the run folder."""
    path = beside(folder)
    write_atomic(path, dump(config))
    argv = (sys.executable, "-P", "-m", "megatron_troll.cli", command, str(path), *overrides)
    return Job(name, argv, folder.with_name(f"{folder.name}.log"))


def _run(
    jobs: Sequence[Job],
    at_once: int,
    interrupts: Interrupts,
    say: Callable[[str], None],
    after: Callable[[Job], None] = lambda job: None,
) -> None:
    count = 0

    def ended(end: Ended) -> None:
        nonlocal count
        count += 1
        how = "ended" if end.code == 0 else f"failed with exit code {end.code}, see {end.job.log}"
        say(f"{count}/{len(jobs)} {end.job.name}: {how}, {end.seconds:.0f} s")
        after(end.job)

    run_jobs(jobs, at_once, interrupts, ended)
