"""Kills, full disks and misuse: what is complete stays usable, and errors say what to do."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_troll.mcore.checkpoint import CheckpointError, Checkpoints
from megatron_troll.mcore.checkpoint_folder import path_of, steps
from tests.dist.checkpoint_run import Run, fill, training, values_of
from tests.dist.harness import RankPool
from tests.dist.tiny import MOE, reference
from tests.faults import file_size_limit, signal_helpers

# Forks from a server that has imported everything: a killed child is replaced in a second.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["megatron_troll.mcore.checkpoint", "tests.dist.checkpoint_run"])


@pytest.fixture(scope="module")
def alone() -> Run:
    return Run(dict(reference(MOE).state_dict()), {}, MOE)


@pytest.fixture(scope="module")
def pp2(alone: Run) -> Run:
    return Run(alone.weights, {"pp": 2}, MOE)


def load_filled(run: Run, folder: str, step: Any = "latest") -> tuple[int, set[float]]:
    """The step that was loaded, and the values of all weights on this rank."""
    with training(run) as trained:
        state = Checkpoints(folder, {"policy": trained}).load(step)
        return state["step"], values_of(trained)


def test_a_kill_leaves_the_last_complete_one(alone: Run, ranks1: RankPool, tmp_path: Path) -> None:
    halves = 0
    for moment in (0.1, 0.4, 0.7, 0.9):
        folder = tmp_path / str(moment)
        kill_while_saving(alone, folder, moment)
        halves += len(list(folder.glob("*.tmp")))
        last = steps(folder)[-1]
        assert ranks1.run(load_filled, alone, str(folder)) == [(last, {float(last)})]
        assert ranks1.run(continue_after, alone, str(folder)) == [[last, last + 1]]
        assert list(folder.glob("*.tmp")) == []
    assert halves > 1


def kill_while_saving(run: Run, folder: Path, moment: float) -> None:
    """SIGKILL a process and its writers at `moment`, a fraction of the time that its last save took."""
    process = SERVER.Process(target=save_for_ever, args=(run, str(folder)))
    process.start()
    try:
        wait_for(lambda: len(steps(folder)) == 2 or not process.is_alive())
        *_, before, last = (os.stat(path_of(folder, step)).st_ctime for step in steps(folder))
        wait_for(lambda: any(folder.glob("*.tmp")))
        time.sleep(moment * (last - before))
    finally:
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_a_killed_rank_leaves_no_process(alone: Run, tmp_path: Path) -> None:
    """Not Megatron's server of results either; only the process itself is killed."""
    folder = tmp_path / "run"
    process = SERVER.Process(target=save_for_ever, args=(alone, str(folder)))
    process.start()
    try:
        wait_for(lambda: len(steps(folder)) == 2 or not process.is_alive())
        assert process.pid is not None
        helpers = children_of(process.pid)
        assert helpers
    finally:
        process.kill()
        process.join()
    wait_for(lambda: not any(Path(f"/proc/{helper}").exists() for helper in helpers))


def test_a_writers_helper_that_is_killed_is_named_and_replaced(
    alone: Run, ranks1: RankPool, tmp_path: Path
) -> None:
    ((said, saved),) = ranks1.run(save_without_helper, alone, str(tmp_path))
    assert "step_000002" in said
    assert "rank 0: the process that collects what Megatron's writer has written ended, as when it is" in said
    assert "Steps that are still usable: [1]" in said
    assert saved == [1, 3]


def save_without_helper(run: Run, folder: str) -> tuple[str, list[int]]:
    """The error of a save whose helper process was killed, and the steps after one more save."""
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained})
        checkpoints.save(1, {})
        for child in children_of(os.getpid()):
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(child, signal.SIGKILL)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, {})
        checkpoints.save(3, {})
        return str(caught.value), checkpoints.steps()


def children_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def save_for_ever(run: Run, folder: str) -> None:
    os.setsid()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}.store", rank=0, world_size=1)
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained}, keep_last=2)
        for step in count(1):
            fill(trained, step)
            checkpoints.save(step, {"step": step})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def continue_after(run: Run, folder: str) -> list[int]:
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained})
        last = checkpoints.load()["step"]
        checkpoints.save(last + 1, {"step": last + 1})
        return checkpoints.steps()


def test_an_asynchronous_save_holds_the_moment_it_was_asked_for(
    pp2: Run, ranks2: RankPool, tmp_path: Path
) -> None:
    assert ranks2.run(save_behind, pp2, str(tmp_path)) == [[[], [1], [1], [1, 2]]] * 2
    assert ranks2.run(load_filled, pp2, str(tmp_path), 1) == [(1, {1.0})] * 2
    assert ranks2.run(load_filled, pp2, str(tmp_path), 2) == [(2, {2.0})] * 2


def save_behind(run: Run, folder: str) -> list[list[int]]:
    """The complete steps right after asking, after `maybe_finalize`, after asking again, after `finish`."""
    seen = []
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained}, asynchronous=True)
        for step, complete in ((1, wait_by_polling), (2, Checkpoints.finish)):
            fill(trained, step)
            checkpoints.save(step, {"step": step})
            fill(trained, -1.0)
            seen.append(checkpoints.steps())
            complete(checkpoints)
            seen.append(checkpoints.steps())
    return seen


def wait_by_polling(checkpoints: Checkpoints) -> None:
    deadline = time.monotonic() + 30
    while not checkpoints.steps():
        assert time.monotonic() < deadline
        checkpoints.maybe_finalize()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_to_every_process_of_a_job_costs_no_checkpoint(
    asynchronous: bool, pp2: Run, ranks2: RankPool, tmp_path: Path
) -> None:
    helpers, complete = zip(*ranks2.run(save_while_asked, pp2, str(tmp_path), asynchronous), strict=True)
    assert min(helpers) > 0
    assert complete == ([1, 2], [1, 2])


def save_while_asked(run: Run, folder: str, asynchronous: bool) -> tuple[int, list[int]]:
    """How many processes were signalled, and the steps that are complete."""
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained}, asynchronous=asynchronous)
        helpers = []
        for step in (1, 2):
            checkpoints.save(step, {"step": step})
            helpers.append(len(signal_helpers()))
        checkpoints.finish()
        return min(helpers), checkpoints.steps()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limit", [1_000, 40_000])
def test_a_full_disk_on_one_rank_is_an_error_on_all(
    limit: int, asynchronous: bool, pp2: Run, ranks2: RankPool, tmp_path: Path
) -> None:
    messages = ranks2.run(fill_the_disk, pp2, str(tmp_path), limit, asynchronous)
    # torch's zip writer hides the system's words when a tensor is cut short.
    cause = "File too large" if limit == 1_000 else "rank 1: Worker failure"
    assert all("rank 1" in message and cause in message for message in messages)
    assert all("GiB" in message and "are free there" in message for message in messages)
    assert all("Steps that are still usable: [1]" in message for message in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    assert ranks2.run(load_filled, pp2, str(tmp_path)) == [(2, {2.0})] * 2


def fill_the_disk(run: Run, folder: str, limit: int, asynchronous: bool) -> str:
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained}, asynchronous=asynchronous)
        fill(trained, 1)
        save_now(checkpoints, 1)
        fill(trained, 2)
        full = file_size_limit(limit) if trained.model.groups.world.rank == 1 else nullcontext()
        with full, pytest.raises(CheckpointError) as caught:
            save_now(checkpoints, 2)
        save_now(checkpoints, 2)
        return str(caught.value)


def save_now(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"step": step})
    checkpoints.finish()


def test_the_last_and_the_best_are_kept(alone: Run, ranks1: RankPool, tmp_path: Path) -> None:
    wanted = [(1, 0.2), (2, 0.9), (3, None), (4, 0.5), (5, 0.4)]
    assert ranks1.run(save_filled, alone, str(tmp_path), wanted) == [[2, 4, 5]]
    assert ranks1.run(load_filled, alone, str(tmp_path), 2) == [(2, {2.0})]


def save_filled(run: Run, folder: str, wanted: list[tuple[int, float | None]]) -> list[int]:
    """Save each (step, score), all weights equal to the step; the steps that are left at the end."""
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained})
        for step, score in wanted:
            fill(trained, step)
            checkpoints.save(step, {"step": step}, score)
        return checkpoints.steps()


def test_a_score_must_be_a_number(alone: Run, ranks1: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the score of step 1 is nan"):
        ranks1.run(save_filled, alone, str(tmp_path), [(1, float("nan"))])


def test_going_back_abandons_what_came_after(alone: Run, ranks1: RankPool, tmp_path: Path) -> None:
    ranks1.run(save_filled, alone, str(tmp_path), [(2, 0.1), (4, 0.1), (6, 0.1)])
    assert ranks1.run(go_back, alone, str(tmp_path)) == [[[4, 6], [4, 6], [4, 5]]]
    assert ranks1.run(load_filled, alone, str(tmp_path)) == [(5, {4.0})]


def go_back(run: Run, folder: str) -> list[list[int]]:
    """The steps before, after saving the loaded step again, and after saving another."""
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained})
        seen = [checkpoints.steps()]
        checkpoints.load(4)
        for step in (4, 5):
            checkpoints.save(step, {"step": step})
            seen.append(checkpoints.steps())
        return seen


def test_a_run_does_not_write_among_the_checkpoints_of_another(
    alone: Run, ranks1: RankPool, tmp_path: Path
) -> None:
    ranks1.run(save_filled, alone, str(tmp_path), [(2, None)])
    with pytest.raises(RuntimeError, match="already has step 2 of another run, and this one is at 1"):
        ranks1.run(save_filled, alone, str(tmp_path), [(1, None)])
