"""A run on a mixture continues with the same sources, sets, options and release only."""

from pathlib import Path

import pytest

from megatron_troll.config.load import load
from megatron_troll.data.gym import tasks
from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.run.made_with import Provenance, continued
from megatron_troll.task import PROBLEMS, Task, prepare
from tests.printable import write_printable
from tests.unit.demo_task import line
from tests.unit.run.stored import store

CONFIG = """
name: first
runs: {folder}/runs
models: {{policy: {{path: {folder}/base, init: random, layout: {{tp: 1, ep: 1}}}}}}
data:
  sources:
    sums: {{gym: {{name: chain_sum, max_terms: 2, size: 12}}, weight: 2}}
    sort: {{files: [{folder}/prompts.jsonl], reward: {{name: exact}}}}
  held_out: {{sums: 4, sort: 2}}
  max_prompt_tokens: 220
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
launch: {{ranks: 1}}
"""


class Place:
    """A run of two steps in runs/first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_printable(folder / "base")
        (folder / "prompts.jsonl").write_text("".join(map(line, range(10))))
        (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
        store(folder / "runs" / "first" / "checkpoints", 2, Provenance.of(self.task()).write)

    def task(self, *overrides: str) -> Task:
        return prepare(load(self.folder / "run.yaml", overrides))

    def refusal(self, *overrides: str) -> str:
        with pytest.raises((RunFolderError, *PROBLEMS)) as caught:
            continued(self.task("resume=true", *overrides))
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path, in_process: None) -> Place:
    return Place(tmp_path)


def test_each_source_has_its_reward_and_defaults_are_written_out(place: Place) -> None:
    task = place.task()
    assert {name: reward.name for name, reward in task.rewards.items()} == {"sort": "exact", "sums": "gym"}
    assert task.config.data is not None
    written = task.config.data.sources["sums"].reward
    assert written is not None
    assert (written.fields, written.timeout_s) == ({"credit": "full"}, 10.0)


def test_the_same_mixture_continues_without_a_word(place: Place) -> None:
    found = continued(place.task("resume=true"))
    assert (found.said, found.changed) == ((), ())
    releases = {"reasoning-gym": "0.1.25"}
    parts = found.provenance.parts
    assert (parts["data"].releases, parts["held_out"].releases, parts["rewards"].releases) == (releases,) * 3


CHANGES = [
    ("data.sources.sums.gym.max_terms=3", "data", "data.sources.sums.gym.max_terms 2 there, 3 now"),
    ("data.sources.sums.gym.name=products", "data", "gym.name 'chain_sum' there, 'products' now"),
    ("data.sources.sums.gym.seed=1", "data", "data.sources.sums.gym.seed 0 there, 1 now"),
    ("data.sources.sums.gym.size=9", "data", "data.sources.sums.gym.size 12 there, 9 now"),
    ("data.sources.sums.weight=1", "data", "data.sources.sums.weight 2.0 there, 1.0 now"),
    ("data.sources.sort.instruction=now {question}", "data", "instruction None there, 'now {question}' now"),
    ("data.sources.sort.columns={id: id}", "data", "data.sources.sort.columns.id None there, 'id' now"),
    ("data.sources.sort.answer_form=text", "data", "data.sources.sort.answer_form None there, 'text' now"),
    ("data.held_out.sums=3", "held_out", "data.held_out.sums 4 there, 3 now"),
    (
        "data.sources.sums.reward={name: gym, credit: partial}",
        "rewards",
        "credit 'full' there, 'partial' now",
    ),
    (
        "data.sources.sort.reward={name: regex, pattern: x}",
        "rewards",
        "reward.name 'exact' there, 'regex' now",
    ),
]


@pytest.mark.parametrize(("change", "part", "said"), CHANGES)
def test_a_change_is_refused_by_part_and_key(place: Place, change: str, part: str, said: str) -> None:
    refusal = place.refusal(change)
    assert f"\n  {part}: " in refusal
    assert said in refusal
    accepted = place.task(f"resume={{accept: [{part}, data, held_out]}}", change)
    assert part in continued(accepted).changed


def test_the_configuration_alone_is_refused_too_and_names_what_lets_it_through(place: Place) -> None:
    from megatron_troll.config.load import dump

    folder = RunFolder.of(place.task().config)
    folder.config.write_text(dump(place.task().config))
    changed = dump(place.task("data.sources.sums.weight=1", "data.held_out.sums=3").config)
    with pytest.raises(RunFolderError, match=r"resume\.accept=\[held_out, data\]"):
        folder.check(changed, resume=True)


def test_another_release_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_troll.run.made_with.version", lambda name: "0.1.26")
    assert "reasoning-gym 0.1.25 there, 0.1.26 now" in place.refusal()
    monkeypatch.setattr(tasks, "version", lambda name: "0.1.26")
    assert "reasoning-gym 0.1.26 is installed" in place.refusal()
