"""What goes wrong in a run is named, and costs no more than it must."""

import json

from tests.e2e.workplace import Workplace

UNRELIABLE = [
    "rollout.engine=tests.e2e.faulty:Unreliable",
    "objective.trust_region={name: tests.e2e.faulty:Brittle}",
]


def test_steps_with_nan_are_skipped_kept_and_in_the_end_fatal(warm: Workplace) -> None:
    """The engine loses a log-prob in step 1, and from step 3 on the loss of one sample is NaN."""
    changes = ["name=broken", "train.steps=9", "train.max_skipped=2", "checkpoint.keep_last=9", *UNRELIABLE]
    done = warm.mtroll("train", "tiny.yaml", *changes)
    rows = warm.metrics("broken")
    assert [row["skipped_updates"] for row in rows[1:]] == [2, 0, 1, 1]
    assert done.code == 1
    assert "2 batches in a row (train.max_skipped): stopping" in done.err[-1]
    assert not any("Traceback" in line for line in done.err)
    for step, culprit in ((1, 5), (3, 2), (4, 2)):
        batch = json.loads((warm.run("broken") / "broken" / f"step_{step:06d}.json").read_text())
        assert [i for i, sample in enumerate(batch) if sample["at_fault"]] == [culprit]
        assert f"at fault: {batch[culprit]['sample']}" in done.out


def test_a_verifier_that_raises_costs_answers_and_not_the_run(warm: Workplace) -> None:
    done = warm.mtroll("train", "tiny.yaml", "name=raises", "reward.name=tests.e2e.rewards:Broken")
    assert done.code == 0, done.err
    assert "RuntimeError: the verifier has a bug" in done.out
    assert "answers failed and count as wrong" in done.out
    assert sum(row.get("reward_errors", 0) for row in warm.metrics("raises")) > 0


def test_a_hang_says_which_rank_waits_where(warm: Workplace) -> None:
    changes = ["name=hung", "reward.name=tests.e2e.rewards:Sleepy", "observe.hang_timeout_s=6"]
    done = warm.mtroll("train", "tiny.yaml", *changes)
    told = "\n".join(done.err)
    assert done.code == 75
    assert "No progress for 6 s (observe.hang_timeout_s)" in told
    assert "rank 0: evaluation" in told
    assert "rank 1: evaluation" in told
    stacks = (warm.run("hung") / "heartbeat" / "hang_rank_1.txt").read_text()
    assert "rewards.py" in stacks


def test_a_file_in_the_way_of_a_folder_costs_nothing_learnt(warm: Workplace) -> None:
    """Rank 0 alone writes rollouts. Both ranks end, and the run goes on from the step it had."""
    changes = ["name=in-the-way", "reward.name=tests.e2e.rewards:InTheWay", "checkpoint.every=0"]
    done = warm.mtroll("train", "tiny.yaml", *changes)
    logs = [(warm.run("in-the-way") / "logs" / f"rank_{rank}.err").read_text() for rank in range(2)]
    assert done.code == 1
    assert "step 1 is saved: continue with resume=true" in done.out
    assert all("rollouts" in log.splitlines()[-1] and "Traceback" not in log for log in logs)
    assert logs[0].splitlines()[-1] == logs[1].splitlines()[-1]
    (warm.run("in-the-way") / "rollouts").unlink()
    (warm.root / "moved").rename(warm.run("in-the-way") / "rollouts")
    (warm.root / "moved").touch()
    resumed = warm.mtroll("train", "tiny.yaml", *changes, "train.steps=2", "resume=true")
    assert resumed.code == 0, resumed.err
    assert [row["step"] for row in warm.metrics("in-the-way")] == [0, 1, 2]


def test_a_full_disk_leaves_the_last_checkpoint_and_names_it(warm: Workplace) -> None:
    changes = ["name=full", "reward.name=tests.e2e.rewards:FullDisk"]
    (warm.root / "full").touch()
    done = warm.mtroll("train", "tiny.yaml", *changes)
    (warm.root / "full").unlink()
    assert done.code == 1
    assert "File too large" in "\n".join(done.err)
    assert "Steps that are still usable: [1, 2]" in "\n".join(done.err)
    resumed = warm.mtroll("train", "tiny.yaml", *changes, "resume=true")
    assert resumed.code == 0, resumed.err
    assert [row["step"] for row in warm.metrics("full")] == [0, 1, 2, 3, 4]
