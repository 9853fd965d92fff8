"""`mtroll eval` on an exported model: the figures of training again, and the same on another layout."""

import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.observe.rollouts import Sample, read_step
from tests.e2e.workplace import Done, Workplace, finish, succeed, wait_until

ALONE = (
    *("eval", "eval.yaml", "name=alone", "launch.ranks=1"),
    *("models.policy.layout={tp: 1, ep: 1}", "rollout.max_sequences=50"),
)


@pytest.fixture(scope="module")
def stopped(finished: Workplace) -> Done:
    """runs/alone, on one rank, that gets SIGTERM in its first data set."""
    with finished.held():
        process = finished.start(*ALONE)
        wait_until(lambda: (finished.run("alone") / "heartbeat").exists(), process)
        process.send_signal(signal.SIGTERM)
    return finish(process)


@pytest.fixture(scope="module")
def evaluated(finished: Workplace, stopped: Done) -> Workplace:
    """runs/evaluated on two ranks, and runs/alone again."""
    assert not (finished.run("alone") / "eval.json").exists()
    succeed(finished.mtroll("eval", "eval.yaml"))
    succeed(finished.mtroll(*ALONE))
    return finished


def sets(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval.json").read_text())["sets"]


def test_the_exported_policy_scores_what_training_said_last(evaluated: Workplace) -> None:
    summary = json.loads((evaluated.run("finished") / "summary.json").read_text())
    found = sets(evaluated.run("evaluated"))["as_trained"]
    assert found["figures"]["mean@1"]["value"] == pytest.approx(summary["held_out_success_after"], rel=1e-6)
    assert found["prompts"] == 16


def test_a_stop_on_request_says_how_to_go_on(stopped: Done) -> None:
    assert "; an evaluation is not resumed: run it again" in succeed(stopped).out


def test_any_layout_and_batch_size_gives_the_same(evaluated: Workplace) -> None:
    assert sets(evaluated.run("alone")) == sets(evaluated.run("evaluated"))


def test_the_figures_are_those_of_the_stored_samples(evaluated: Workplace) -> None:
    figures = sets(evaluated.run("evaluated"))["often"]["figures"]
    groups: dict[str, list[Sample]] = {}
    for sample in read_step(evaluated.run("evaluated"), 2):
        groups.setdefault(sample.prompt, []).append(sample)
    assert [len(group) for group in groups.values()] == [6] * 20
    right = [[sample.reward == 1 for sample in group] for group in groups.values()]
    lengths = [len(sample.tokens) for group in groups.values() for sample in group]
    expected = {
        "mean@6": sum(map(sum, right)) / 120,
        "pass@1": sum(map(sum, right)) / 120,
        "pass@6": sum(map(any, right)) / 20,
        "maj@6": sum(map(majority, groups.values())) / 20,
        "response_length": sum(lengths) / 120,
    }
    for name, value in expected.items():
        assert figures[name]["value"] == pytest.approx(value), name
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures.values())
    assert max(lengths) == 6


def test_it_is_told_and_browsed(evaluated: Workplace) -> None:
    changes = ["name=greedy", "eval.often.sampling={temperature: 0, stop: []}", "eval.often.reward=null"]
    told = succeed(evaluated.mtroll("eval", "eval.yaml", *changes)).out
    assert re.search(r"^ as_trained +16 x 1 +mean@1 +0\.\d{3} +0\.\d{3} to 0\.\d{3} $", told, re.MULTILINE)
    assert "often: no maj@k, reward tests.e2e.rewards:Overlap" in told
    shown = succeed(evaluated.mtroll("rollouts", "runs/greedy", "--step", "2", "--limit", "1")).out
    assert "120 rollouts" in shown
    greedy = list(read_step(evaluated.run("greedy"), 2))
    assert {sample.text for sample in greedy[:6]} == {greedy[0].text}


def test_it_is_not_mixed_with_another(evaluated: Workplace) -> None:
    done = evaluated.mtroll("eval", "eval.yaml")
    assert done.code == 2
    assert done.err == [
        "runs/evaluated holds a finished evaluation. Choose another `name`, or delete the folder."
    ]


def majority(group: list[Sample]) -> float:
    """Whether the most frequent answer is right, each of several as often as the others."""
    counts = Counter(sample.text.strip() for sample in group)
    winners = [text for text, count in counts.items() if count == max(counts.values())]
    return sum(winner == group[0].answer for winner in winners) / len(winners)
