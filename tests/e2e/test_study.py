"""A study of four short runs: stopped, continued, reported. And a stale run that is stopped and continued."""

import json
import shutil
import signal

import pytest

from tests.e2e.workplace import REPOSITORY, Workplace, finish, succeed, untimed, wait_until

STALE = ("rollout.staleness=2", "checkpoint.export=false", "observe.rollouts=false")


@pytest.fixture(scope="module")
def studied(demo: Workplace) -> Workplace:
    """The smoke study, stopped once in its first runs, then run to its end."""
    shutil.copytree(REPOSITORY / "examples", demo.root / "examples")
    study = ("study", "examples/study/smoke.yaml", "--jobs", "2")
    first = demo.start(*study)
    wait_until(lambda: list(demo.run("smoke").glob("seed-0/stress/*/metrics.jsonl")), first)
    first.send_signal(signal.SIGTERM)
    assert "go on: mtroll study examples/study/smoke.yaml" in succeed(finish(first)).out
    succeed(demo.mtroll(*study))
    return demo


def test_every_run_is_done_once(studied: Workplace) -> None:
    runs = sorted(studied.run("smoke").glob("seed-*/stress/*/summary.json"))
    assert [f"{path.parts[-4]}/{path.parts[-2]}" for path in runs] == [
        f"seed-{seed}/{method}" for seed in (0, 1) for method in ("grpo", "grpo-troll")
    ]
    for path in runs:
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        assert [row["staleness"] for row in rows[1:]] == [0, 1, 1, 1]
    again = succeed(studied.mtroll("study", "examples/study/smoke.yaml"))
    assert again.out.splitlines()[0].startswith("all runs are finished")


def test_methods_of_a_seed_share_their_warm_start(studied: Workplace) -> None:
    results = json.loads((studied.root / "examples" / "study" / "results" / "smoke.json").read_text())
    before = {(result["method"], result["seed"]): result["before"] for result in results}
    assert len(before) == 4
    for seed in (0, 1):
        assert before["grpo", seed] == before["grpo-troll", seed]


def test_the_report_needs_no_run_folders(studied: Workplace) -> None:
    report = ("study", "report", "examples/study/smoke.yaml", "--output")
    succeed(studied.mtroll(*report, "with.md"))
    studied.run("smoke").rename(studied.root / "elsewhere")
    succeed(studied.mtroll(*report, "without.md"))
    (studied.root / "elsewhere").rename(studied.run("smoke"))
    page = (studied.root / "with.md").read_text()
    assert "4 of 4 runs finished" in page
    assert page.replace("images/with", "images/without") == (studied.root / "without.md").read_text()
    assert (studied.root / "images" / "with-stress.png").is_file()


def test_a_stale_run_that_was_stopped_ends_like_one_that_was_not(warm: Workplace) -> None:
    """Batches that wait for their turn are in the checkpoint: none is drawn again, none is lost."""
    succeed(warm.mtroll("train", "tiny.yaml", "name=stale", *STALE))
    process = warm.start("train", "tiny.yaml", "name=stale-again", *STALE)
    wait_until(lambda: len(warm.metrics("stale-again")) > 2, process)
    with warm.held():
        process.send_signal(signal.SIGTERM)
    assert "continue with resume=true" in succeed(finish(process)).out
    stopped = len(warm.metrics("stale-again")) - 1
    assert (warm.run("stale-again") / "checkpoints" / f"step_{stopped:06d}" / "pending_000.npz").is_file()
    succeed(warm.mtroll("train", "tiny.yaml", "name=stale-again", "resume=true", *STALE))
    assert untimed(warm.metrics("stale-again")) == untimed(warm.metrics("stale"))
    assert [row["staleness"] for row in warm.metrics("stale")[1:]] == [0, 1, 2, 2]
