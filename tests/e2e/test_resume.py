"""A run that is stopped, killed and continued ends as if nothing had happened."""

import json
import os
import shutil
import signal
from dataclasses import dataclass

import pytest

from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Done, Workplace, finish, listening, succeed, untimed, wait_until

CONTINUE = ("train", "runs/again", "resume=true")


@dataclass(frozen=True)
class Story:
    """A rerun of the finished run from its folder, as `again`.

    addresses   where its processes listened
    second      another process that wanted its folder
    stopped     it got SIGTERM in its first evaluation; steps: its metrics then
    killed      it was continued, and one of its ranks was killed after step 2
    """

    addresses: set[str]
    second: Done
    stopped: Done
    steps: list[int]
    killed: Done


@pytest.fixture(scope="module")
def story(finished: Workplace) -> Story:
    with finished.held():
        first = finished.start("train", "runs/finished", "name=again")
        heartbeat = finished.run("again") / "heartbeat" / "rank_0.json"
        wait_until(lambda: heartbeat.exists() and '"evaluation"' in heartbeat.read_text(), first)
        addresses = listening(first)
        second = finished.mtroll(*CONTINUE, "name=again")
        first.send_signal(signal.SIGTERM)
    stopped = finish(first)
    steps = [row["step"] for row in finished.metrics("again")]
    resumed = finished.start(*CONTINUE)
    wait_until(lambda: len(finished.metrics("again")) > 2, resumed)
    with finished.held():
        heartbeat = finished.run("again") / "heartbeat" / "rank_1.json"
        os.kill(json.loads(heartbeat.read_text())["pid"], signal.SIGKILL)
        killed = finish(resumed)
    return Story(addresses, second, stopped, steps, killed)


def test_a_run_on_one_machine_listens_only_on_loopback(story: Story) -> None:
    assert story.addresses == {"127.0.0.1"}


def test_a_second_writer_is_refused(story: Story) -> None:
    assert story.second.code == 2
    assert len(story.second.err) == 1
    assert "runs/again is being written by pid" in story.second.err[0]


def test_a_stop_on_request_ends_well_with_a_checkpoint(story: Story) -> None:
    assert "stopped after step 0; continue with resume=true" in succeed(story.stopped).out
    assert story.steps == [0]


def test_a_rank_that_dies_ends_the_job_and_is_named(story: Story) -> None:
    assert story.killed.code == 128 + signal.SIGKILL
    assert story.killed.err[-1].startswith("rank 1 failed (killed by SIGKILL")


@pytest.mark.parametrize(
    ("name", "layout"),
    [("on-two-stages", "{tp: 1, ep: 1, pp: 2}"), ("on-one-rank", "{tp: 1, ep: 1}")],
)
def test_a_run_continues_on_another_layout(story: Story, finished: Workplace, name: str, layout: str) -> None:
    """Tokens are drawn by keys: the next step draws the same rollouts on any layout, and learns the same. On
    one rank prompts are no longer shared. The copy of a run is the place of its run."""
    shared = name != "on-one-rank"
    shutil.copytree(finished.run("again"), finished.run(name))
    kept = max(int(path.name[5:]) for path in (finished.run(name) / "checkpoints").glob("step_??????"))
    changes = [f"train.steps={kept + 1}", f"models.policy.layout={layout}", "launch.ranks=null"]
    changes += [] if shared else ["train.share_prefixes=false"]
    done = succeed(finished.mtroll("train", f"runs/{name}", "resume=true", *changes))
    assert f"continuing from step {kept} of runs/{name}\n" in done.out
    here, there = finished.metrics(name)[kept + 1], finished.metrics("finished")[kept + 1]
    assert (here["spared_tokens"] > 0.5) == shared
    for figure in ("grad_norm", "entropy", "kl_before", "success"):
        assert here[figure] == pytest.approx(there[figure], rel=1e-5), figure
    # A mean of terms that nearly cancel.
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-6)


def test_prompts_that_changed_under_their_path_are_refused_or_accepted_by_name(
    story: Story, finished: Workplace
) -> None:
    train = finished.run("demo") / "data" / "train.jsonl"
    shutil.copytree(finished.run("again"), finished.run("changed"))
    whole = train.read_text()
    train.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    try:
        refused = finished.mtroll("train", "runs/changed", "resume=true")
        accepted = ("resume.accept=[data]", "train.steps=3", "checkpoint.export=false")
        done = succeed(finished.mtroll("train", "runs/changed", *accepted))
    finally:
        train.write_text(whole)
    assert refused.code == 2
    assert "  data: 64 training prompts (hash " in "\n".join(refused.err)
    assert f"{train.relative_to(finished.root)} has changed" in "\n".join(refused.err)
    assert "WARNING: data has changed since step " in done.out
    remarks = json.loads((finished.run("changed") / "summary.json").read_text())["remarks"]
    assert any("data was changed on purpose: 64 training prompts" in remark for remark in remarks)
    assert (finished.run("changed") / "changes.json").exists()


def test_all_figures_are_those_of_the_run_that_nothing_happened_to(story: Story, finished: Workplace) -> None:
    """One step more than that run: its rollouts are drawn by the model that it exported."""
    succeed(finished.mtroll(*CONTINUE, "train.steps=5"))
    rows = finished.metrics("again")
    assert untimed(rows)[:5] == untimed(finished.metrics("finished"))
    assert all(row["spared_tokens"] > 0.5 for row in rows[1:])
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    drawn = finished.run("again") / "rollouts" / "step_000005.0-of-1.jsonl.gz"
    assert largest_gap(finished.run("finished") / "hf", drawn) < 1e-4
