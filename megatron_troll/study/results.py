"""The stored result of each run of a study: small enough to commit, enough to make every figure."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import load
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.observe.runs import read_run
from megatron_troll.study.plan import Cell, StudyPlan
from megatron_troll.system import write_atomic

DIGITS = 5


@dataclass(frozen=True)
class RunResult:
    """One finished run. held_out[i] and entropy[i] are of step i + 1, None if the figure is absent or not
    finite; before: held-out success of the warm start. tokens: sampled for training, stop tokens included;
    date: the day it ended (UTC); digest: `StudyPlan.digest` of the run."""

    setting: str
    method: str
    seed: int
    before: float
    held_out: tuple[float | None, ...]
    entropy: tuple[float | None, ...]
    responses: int
    tokens: int
    updates: int
    skipped: int
    seconds: float
    date: str
    digest: str

    @property
    def cell(self) -> Cell:
        return Cell(self.setting, self.method, self.seed)


def results_path(study: Path) -> Path:
    """Path of the results of a study file."""
    return study.parent / "results" / f"{study.stem}.json"


def finished(plan: StudyPlan, cell: Cell) -> bool:
    """Whether the run, as planned now, has reached its last step and written its summary."""
    folder, config = RunFolder(plan.folder(cell)), plan.config(cell)
    if not folder.summary.exists() or not as_planned(folder.root, config):
        return False
    return read_run(folder.root, str(cell)).rows[-1]["step"] == config.train.steps


def as_planned(folder: Path, config: Config) -> bool:
    """Whether the run in `folder` was started with this configuration, according to the file beside it."""
    try:
        return load(beside(folder)) == config
    except ConfigError:
        return False


def beside(folder: Path) -> Path:
    """Path of the configuration of a study's run, beside its folder."""
    return folder.with_name(f"{folder.name}.yaml")


def result_of(plan: StudyPlan, cell: Cell) -> RunResult:
    """The result of a finished run, from its folder."""
    folder, config = RunFolder(plan.folder(cell)), plan.config(cell)
    run = read_run(folder.root, str(cell))
    first, rows = run.rows[0], run.rows[1:]
    responses = config.rollout.prompts * config.rollout.samples
    skipped = int(sum(row["skipped_updates"] for row in rows))
    masked = int(sum(row.get("masked_updates", 0) for row in rows))
    ended = datetime.fromtimestamp(folder.summary.stat().st_mtime, UTC)
    return RunResult(
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        before=_rounded(first["held_out_success"]) or 0.0,
        held_out=tuple(_rounded(row.get("held_out_success")) for row in rows),
        entropy=tuple(_rounded(row.get("entropy")) for row in rows),
        responses=responses * len(rows),
        tokens=round(sum(row["response_length"] for row in rows) * responses),
        updates=config.train.updates * len(rows) - skipped - masked,
        skipped=skipped,
        seconds=round(run.summary["seconds"], 1),
        date=f"{ended:%Y-%m-%d}",
        digest=plan.digest(cell),
    )


def read_results(path: Path) -> dict[Cell, RunResult]:
    """Read a results file; empty if it does not exist."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())
    results = [
        RunResult(**row | {name: tuple(row[name]) for name in ("held_out", "entropy")}) for row in rows
    ]
    return {result.cell: result for result in results}


def write_results(path: Path, results: Iterable[RunResult]) -> None:
    """Write a JSON array, one line per run, in a fixed order."""
    ordered = sorted(results, key=lambda result: (result.setting, result.method, result.seed))
    lines = ",\n".join(json.dumps(asdict(result), allow_nan=False) for result in ordered)
    write_atomic(path, f"[\n{lines}\n]\n")


def add(path: Path, result: RunResult) -> None:
    """Add a result to the results file; it replaces an earlier result of the same run."""
    write_results(path, (read_results(path) | {result.cell: result}).values())


def gather(plan: StudyPlan, path: Path) -> dict[Cell, RunResult]:
    """The results of the plan's finished runs, from the results file, which is updated first. Results whose
    digest no longer matches the study are not returned; the file keeps them until their runs are repeated."""
    kept = read_results(path)
    results = kept | {cell: result_of(plan, cell) for cell in plan.cells() if finished(plan, cell)}
    if results != kept:
        write_results(path, results.values())
    known = {cell: results[cell] for cell in plan.cells() if cell in results}
    return {cell: result for cell, result in known.items() if result.digest == plan.digest(cell)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)
