"""`mtroll sft`: demonstrations in, a model in Hugging Face format out."""

import json
import shutil
import signal
from pathlib import Path

from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Workplace, finish, succeed, wait_until


def test_the_loss_falls_and_the_model_is_exported(warm: Workplace) -> None:
    rows = warm.metrics("demo-warm-start")
    assert [row["step"] for row in rows] == list(range(31))
    assert rows[30]["loss"] < rows[1]["loss"] / 2


def test_rl_draws_from_the_exported_model(finished: Workplace) -> None:
    """The rollouts of RL's first step have the log-probs that transformers computes."""
    drawn = finished.run("finished") / "rollouts" / "step_000001.0-of-1.jsonl.gz"
    assert largest_gap(finished.run("demo-warm-start") / "hf", drawn) < 1e-4


def test_an_interrupted_warm_start_ends_well_and_is_started_again(demo: Workplace) -> None:
    running = demo.start("sft", "warm.yaml", "name=cut-short", "sft.steps=100000")
    wait_until(lambda: len(demo.metrics("cut-short")) > 1, running)
    running.send_signal(signal.SIGINT)
    done = succeed(finish(running))
    assert "a warm start is not resumed: delete runs/cut-short and run it again" in done.out
    assert not (demo.run("cut-short") / "hf").exists()
    again = demo.mtroll("sft", "warm.yaml", "name=cut-short", "sft.steps=100000")
    assert again.code == 2
    assert again.err[-1].endswith(
        "A warm start is not continued, choose another `name`, or delete the folder."
    )


def test_the_end_of_a_turn_that_is_taught_stops_answers_and_is_exported(demo: Workplace) -> None:
    """As in published Base models, the end of sequence is a token that the chat template never writes."""
    base = Path(shutil.copytree(demo.run("demo") / "base", demo.root / "as-base"))
    for name, change in (
        ("generation_config.json", {"eos_token_id": 0}),
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"eos_token": "<pad>"}),
    ):
        told = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(told | change))
    alone = ["models.policy.layout={tp: 1, ep: 1}", "launch.ranks=null", "sft.steps=60"]
    done = succeed(demo.mtroll("sft", "warm.yaml", "name=based", f"models.policy.path={base}", *alone))
    assert "the chat template ends a turn with '<|end|>'" in done.out
    exported = json.loads((demo.run("based") / "hf" / "generation_config.json").read_text())
    assert exported == {"eos_token_id": [0, 4], "pad_token_id": 0}


def test_a_warm_start_that_blows_up_says_so(demo: Workplace) -> None:
    alone = ["models.policy.layout={tp: 1, ep: 1}", "launch.ranks=null"]
    done = demo.mtroll("sft", "warm.yaml", "name=blown", "models.policy.optimizer.lr=1e30", *alone)
    assert done.code == 1
    assert "the loss or a gradient is NaN or Inf; at fault: " in done.err[-1]
    assert done.err[-1].endswith("(the batch is in runs/blown/broken/step_000002.json); lower optimizer.lr")
