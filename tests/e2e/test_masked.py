"""Steps in which every answer is left out of the loss: no optimizer moves, and the run says so."""

import json

from tests.e2e.workplace import Workplace, succeed

RANDOM = "init: random, dtype: fp32, layout: {tp: 2, ep: 2}, optimizer: {lr: 1e-3, weight_decay: 0.1}"
ALL_CUT = (
    "name=masked",
    "train={steps: 2, updates: 2}",
    "checkpoint={every: 1, export: false}",
    f"models.policy={{path: runs/demo/base, {RANDOM}}}",
    f"models.critic={{path: runs/demo/base, {RANDOM}}}",
    f"models.rollout={{path: runs/demo/small, {RANDOM}}}",
    "objective.advantage.name=gae",
    "objective.trust_region.name=none",
    "objective.correction.name=jackpot",
    "rollout.sampling.max_tokens=1",
    "reward={name: exact, overlong: {mode: mask}}",
)


def test_steps_whose_answers_are_all_masked_move_no_optimizer(demo: Workplace) -> None:
    done = succeed(demo.mtroll("train", "tiny.yaml", *ALL_CUT))
    assert [row.get("masked_updates") for row in demo.metrics("masked")] == [None, 2, 2]
    assert all("grad_norm" not in row for row in demo.metrics("masked"))
    assert "step 1: 2 of 2 updates not taken, because every token of them is masked" in done.out
    for step in (1, 2):
        path = demo.run("masked") / "checkpoints" / f"step_{step:06d}" / "checkpoint.json"
        models = json.loads(path.read_text())["models"]
        assert {name: model["counters"] for name, model in models.items()} == {
            name: {"optimizer_steps": 0, "schedule_steps": 0} for name in ("policy", "critic", "rollout")
        }
