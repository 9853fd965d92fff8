"""A request that cannot be met is refused at once: one message, exit code 2, nothing written."""

import pytest

from tests.e2e.workplace import Workplace


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny.yaml", "train.stpes=3"], "train.stpes: unknown key; did you mean 'steps'?"),
        (["sft", "tiny.yaml"], "sft: missing; `mtroll sft` needs sft.files"),
    ],
)
def test_nothing_is_started(warm: Workplace, arguments: list[str], message: str) -> None:
    done = warm.mtroll(*arguments, "name=refused")
    assert (done.code, len(done.err), done.out) == (2, 1, "")
    assert done.err[0].startswith(message)
    assert not warm.run("refused").exists()


def test_a_finished_run_is_not_mixed_with_another(finished: Workplace) -> None:
    before = finished.metrics("finished")
    done = finished.mtroll("train", "tiny.yaml", "rollout.samples=2")
    assert done.code == 2
    assert done.err[:2] == [
        "runs/finished holds a run of another config. These keys differ:",
        "  rollout.samples: 4 there, 2 now",
    ]
    assert finished.metrics("finished") == before
