"""A run on tasks of reasoning-gym, with a curriculum and two rewards, and a file: two steps, and the second
again from the checkpoint of the first."""

import json
import shutil

import pytest

from tests.e2e.workplace import Workplace, succeed, untimed
from tests.printable import write_printable

CONFIG = """
name: whole
models: {policy: {path: model, init: random}}
data:
  sources:
    sums:
      gym: {name: chain_sum, size: 40, curriculum: {success: 0.1, window: 4, last: 1}}
      weight: 2
      reward:
        name: sum
        parts: {right: {name: gym}, sound: {name: "tests.e2e.rewards:Checksum", weight: 0.5}}
        success: sound
    sort: {files: [prompts.jsonl], reward: {name: exact}}
  held_out: {sums: 4, sort: 2}
  max_prompt_tokens: 220
rollout: {prompts: 6, samples: 2, sampling: {max_tokens: 4}}
train: {steps: 2, updates: 2}
evaluation: {every: 1}
checkpoint: {every: 1, export: false}
observe: {tensorboard: false}
launch: {ranks: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A finished run, and in runs/part what was left of it after its first step."""
    place = Workplace(tmp_path_factory.mktemp("mixture"))
    write_printable(place.root / "model")
    rows = [{"messages": [{"role": "user", "content": f"sort {i}1"}], "answer": "1"} for i in range(9)]
    (place.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place.root / "run.yaml").write_text(CONFIG)
    succeed(place.mtroll("train", "run.yaml"))
    shutil.copytree(place.run("whole"), place.run("part"))
    shutil.rmtree(place.run("part") / "checkpoints" / "step_000002")
    return place


def test_a_continued_run_draws_and_judges_as_if_nothing_had_happened(place: Workplace) -> None:
    whole = place.metrics("whole")
    assert [row["step"] for row in whole] == [0, 1, 2]
    for row in whole[1:]:
        assert row["success"] == pytest.approx((2 * row["success/sums"] + row["success/sort"]) / 3)
        assert row["success/sums"] == pytest.approx(row["reward/sound"])
        summed = row["reward/right"] + 0.5 * row["reward/sound"]
        assert row["reward"] == pytest.approx((2 * summed + row["success/sort"]) / 3)
    assert [row["level/sums"] for row in whole[1:]] == [0, 1]
    assert {"held_out_success/sums", "held_out_success/sort"} <= whole[0].keys()
    succeed(place.mtroll("train", "runs/part", "name=part", "resume=true"))
    assert untimed(place.metrics("part")) == untimed(whole)
