"""Sources rise with success, and a resumed run stands where the run stood that nothing happened to."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from megatron_troll.config import Curriculum
from megatron_troll.data.curriculum import Curricula
from megatron_troll.data.mixture import MixtureOrder, SourcePrompts, Stage
from megatron_troll.run.state import TrainState
from megatron_troll.types import Prompt
from tests.unit.data.test_mixture import ids, prompts

SAMPLES = 2


def source(name: str, levels: int, weight: float = 1.0, **curriculum: Any) -> SourcePrompts:
    made = tuple(prompts(f"{name}{level}-", 6) for level in range(levels))
    of = tuple(tuple(Prompt(p.id, p.messages, "", source=name) for p in level) for level in made)
    return SourcePrompts(name, weight, of, (), Curriculum(**curriculum) if curriculum else None)


SOURCES = (source("a", 3, success=0.5, window=4, first=2), source("b", 1))


@dataclass
class Run:
    """The prompts that batches draw and the success on them, `staleness` batches ahead. right: the levels of
    a that are answered right."""

    staleness: int = 0
    right: tuple[int, ...] = (0, 1)
    size: int = 4
    order: MixtureOrder = field(default_factory=lambda: MixtureOrder(SOURCES, seed=1))
    curricula: Curricula = field(default_factory=lambda: Curricula(SOURCES))
    begun: dict[int, list[str]] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            for batch in range(step, step + self.staleness + 1):
                if batch not in self.begun:
                    self.positions[batch] = self.order.position
                    drawn = self.order.next(self.size, self.curricula.stages(batch))
                    self.begun[batch] = ids(drawn)
                    self.prompts = getattr(self, "prompts", {}) | {p.id: p for p in drawn}
            asked = [self.prompts[name] for name in self.begun[step] for _ in range(SAMPLES)]
            success = np.array([p.id.startswith(tuple(f"a{level}" for level in self.right)) for p in asked])
            begins = step + 1 + self.staleness
            self.said += self.curricula.observe(asked, success.astype(float), begins, self.order.drawn)

    def levels(self, last: int) -> list[int]:
        return [int(self.curricula.metrics(batch)["level/a"]) for batch in range(1, last + 1)]


def test_a_source_rises_when_its_window_is_full_of_success() -> None:
    """Two of four prompts are of a; the window holds four."""
    run = Run()
    run.train(1, 8)
    assert run.levels(8) == [2, 2, 3, 3, 4, 4, 4, 4]
    assert run.said == [
        "a rises to level 3 with batch 3: success 1.000 on its last 4 prompts",
        "a rises to level 4 with batch 5: success 1.000 on its last 4 prompts",
    ]
    of_a = [[name[1] for name in run.begun[batch] if name[0] == "a"] for batch in range(1, 9)]
    assert of_a == [["0", "0"]] * 2 + [["1", "1"]] * 2 + [["2", "2"]] * 4
    assert run.curricula.metrics(8).keys() == {"level/a"}


def test_what_fails_keeps_its_level() -> None:
    run = Run(right=(0,))
    run.train(1, 9)
    assert run.levels(9) == [2, 2] + [3] * 7
    assert len(run.curricula.state["a"]["recent"]) == 4


def test_a_new_level_begins_an_epoch_of_its_own() -> None:
    run = Run(right=(0,))
    run.train(1, 5)
    drawn = [name for batch in (3, 4, 5) for name in run.begun[batch] if name[0] == "a"]
    assert sorted(drawn) == [f"a1-{i}" for i in range(6)]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_answers_from_before_the_rise_do_not_count_for_the_next_level(staleness: int) -> None:
    run = Run(staleness)
    run.train(1, 12)
    rises = [batch for batch, _ in run.curricula.state["a"]["rises"]]
    assert rises[0] == 3 + staleness
    # Two batches of the new level have to be trained on, and those under way are of the old one.
    assert rises[1] == rises[0] + 2 + staleness


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("saved", range(1, 9))
def test_a_resumed_run_begins_the_same_batches(staleness: int, saved: int) -> None:
    """Batches that were under way are begun again from the position of the first of them, and each at the
    level that it had."""
    whole, before = Run(staleness), Run(staleness)
    whole.train(1, 12)
    before.train(1, saved)
    state = json.loads(json.dumps(before.curricula.state))
    resumed = Run(staleness)
    resumed.curricula.load(TypeAdapter(TrainState).validate_json(json.dumps({"levels": state})).levels)
    resumed.order.seek(before.positions.get(saved + 1, before.order.position))
    resumed.train(saved + 1, 12)
    assert resumed.begun == {batch: whole.begun[batch] for batch in resumed.begun}
    assert resumed.levels(12) == whole.levels(12)
    assert before.said + resumed.said == whole.said


def test_a_state_of_other_levels_or_sources_does_no_harm() -> None:
    """After an accepted change of the data."""
    curricula = Curricula(SOURCES)
    curricula.load(
        {"a": {"rises": [[2, 3], [4, 9], [5, 11], [6, 20]], "recent": []}, "gone": {"rises": [[1, 1]]}}
    )
    assert curricula.stages(9) == {"a": Stage(2, 9)}
    order = MixtureOrder(SOURCES, seed=1)
    assert len(order.next(6, curricula.stages(9))) == 6
    curricula.load({})
    assert curricula.stages(9) == {"a": Stage(0, 0)}


@pytest.mark.parametrize("rises", [[[1]], [[1, -1]], [["1", 2]]])
def test_a_damaged_state_is_refused(rises: list[Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TrainState).validate_json(json.dumps({"levels": {"a": {"rises": rises, "recent": []}}}))
