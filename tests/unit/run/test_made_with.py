"""A run continues only with what it was made with, unless a change is accepted by name, and then says so."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from megatron_troll.config.load import load
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.run import digest, made_with
from megatron_troll.run.made_with import RECORD, TRAINED_ON, Continued, Provenance, continued, note, read
from megatron_troll.system import write_atomic
from megatron_troll.task import Task, prepare
from tests.unit.demo_task import line
from tests.unit.run.stored import store

CONFIG = """
name: first
runs: {folder}/runs
models:
  policy: {{path: {folder}/base, init: random, layout: {{tp: 1, ep: 1}}}}
  reference: {{path: {folder}/reference}}
data: {{files: [{folder}/prompts.jsonl], held_out: [{folder}/held_out.jsonl], max_prompt_tokens: 32}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
objective: {{kl: {{name: k3}}}}
reward: {{name: "my_rewards.judge:Mine"}}
launch: {{ranks: 1}}
"""
REWARD = """
from megatron_troll.rewards.reward import Reward
from my_rewards import helpers

class Mine(Reward):
    def __call__(self, text, prompt):
        return helpers.value(text)
"""


class Place:
    """A run of two steps in runs/first, and what it was made with, in files that a test changes."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        shutil.copytree(base, folder / "base")
        shutil.copytree(base, folder / "reference")
        self.write("reference/model.safetensors", weights(0))
        self.write("prompts.jsonl", "".join(map(line, range(10))).encode())
        self.write("held_out.jsonl", "".join(map(line, range(10, 14))).encode())
        self.write("my_rewards/__init__.py", b"")
        self.write("my_rewards/judge.py", REWARD.encode())
        self.write("my_rewards/helpers.py", b"value = len\n")
        self.write("my_rewards/unused.py", b"a = 1\n")
        self.write("run.yaml", CONFIG.format(folder=folder).encode())

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    def task(self, *overrides: str) -> Task:
        return prepare(load(self.folder / "run.yaml", overrides))

    def checkpoint(self, step: int) -> Path:
        return self.folder / "runs" / "first" / "checkpoints" / f"step_{step:06d}"

    def save(self, step: int, provenance: Provenance) -> None:
        store(self.checkpoint(step).parent, step, provenance.write)

    def resume(self, *overrides: str) -> Continued:
        return continued(self.task("resume=true", *overrides))

    def resize(self, name: str, content: bytes) -> None:
        """Replace a file of the checkpoint, whose manifest then has its size."""
        (self.checkpoint(2) / name).write_bytes(content)
        path = self.checkpoint(2) / "checkpoint.json"
        manifest = json.loads(path.read_text())
        manifest["files"][name] = len(content)
        manifest.pop("sums", None)  # they are checked elsewhere
        path.write_text(json.dumps(manifest))

    def refusal(self, *overrides: str) -> str:
        with pytest.raises((RunFolderError, CheckpointError)) as caught:
            self.resume(*overrides)
        return str(caught.value)


def weights(seed: int) -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    return len(head).to_bytes(8, "little") + head + np.full(4, seed, dtype=np.float32).tobytes()


@pytest.fixture
def place(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(tmp_path, base)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("megatron_troll.checks.check_folder", lambda *arguments: None)
    monkeypatch.setattr("megatron_troll.checks.remarks_on", lambda path: [])
    made.save(2, Provenance.of(made.task()))
    yield made
    for name in [name for name in sys.modules if name.split(".")[0] == "my_rewards"]:
        del sys.modules[name]


def test_a_run_that_nothing_happened_to_continues_without_a_word(place: Place) -> None:
    found = place.resume()
    assert (found.said, found.changed, found.provenance.changes) == ((), (), ())
    names = {"data", "held_out", "tokenizer", "template", "stop_tokens", "reference", "rewards"}
    assert found.provenance.parts.keys() == names


def test_the_same_prompts_in_another_form_are_the_same(place: Place) -> None:
    rows = (place.folder / "prompts.jsonl").read_text().splitlines()
    place.write(
        "prompts.jsonl", "\n\n".join(json.dumps(json.loads(row), indent=None) for row in rows).encode()
    )
    assert place.resume().changed == ()


def test_prompts_that_are_gone_are_counted_and_their_file_is_named(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, range(5))).encode())
    said = place.refusal()
    assert "cannot continue from step 2: this has changed:\n  data: 10 training prompts (hash " in said
    assert ") there, 5 (hash " in said
    assert f"{place.folder}/prompts.jsonl has changed; the first prompt with another text is number 6" in said
    assert said.endswith("or let it through with resume.accept=[data].")
    assert place.refusal("resume.accept=[held_out]") == said


def test_another_order_and_another_answer_are_other_prompts(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, (0, 2, 1, *range(3, 10)))).encode())
    assert "the first prompt with another text is number 2" in place.refusal()
    place.write(
        "prompts.jsonl", "".join(map(line, range(10))).replace('"answer": "7"', '"answer": "8"').encode()
    )
    assert "the texts are the same: ids, answers or other fields differ" in place.refusal()


def swapped(place: Place, name: str, old: bytes, new: bytes) -> None:
    content = (place.folder / name).read_bytes()
    assert old in content
    place.write(name, content.replace(old, new))


@pytest.mark.parametrize(
    ("part", "file", "old", "new", "said"),
    [
        ("held_out", "held_out.jsonl", b"sort 11", b"sort 15", "held_out.jsonl has changed"),
        ("tokenizer", "base/tokenizer.json", b"{", b"{ ", "tokenizer.json has changed"),
        (
            "reference",
            "reference/model.safetensors",
            b"\0\0\0\0",
            b"\0\0\0\1",
            "model.safetensors has changed",
        ),
        ("rewards", "my_rewards/judge.py", b"helpers.value(text)", b"1.0", "my_rewards/judge.py has changed"),
        ("rewards", "my_rewards/helpers.py", b"len", b"max", "my_rewards/helpers.py has changed"),
    ],
)
def test_what_changed_under_its_path_is_refused_by_part_and_file(
    place: Place, part: str, file: str, old: bytes, new: bytes, said: str
) -> None:
    swapped(place, file, old, new)
    refusal = place.refusal()
    assert f"this has changed:\n  {part}: " in refusal
    assert said in refusal
    assert refusal.count("\n") == 2
    found = place.resume(f"resume.accept=[{part}]")
    assert found.changed == (part,)
    assert found.said[0].startswith(f"WARNING: {part} has changed since step 2: ")


def test_a_module_that_the_reward_does_not_import_may_change(place: Place) -> None:
    swapped(place, "my_rewards/unused.py", b"1", b"2")
    assert place.resume().changed == ()


def test_another_chat_template_is_refused(place: Place) -> None:
    settings = place.folder / "base" / "tokenizer_config.json"
    template = place.folder / "base" / "chat_template.jinja"
    if template.is_file():
        template.write_text(template.read_text() + " ")
    else:
        content = json.loads(settings.read_text())
        settings.write_text(json.dumps({**content, "chat_template": content["chat_template"] + " "}))
    assert "this has changed:\n  template: " in place.refusal()


def test_another_stop_token_is_refused(place: Place) -> None:
    place.write("base/generation_config.json", b'{"eos_token_id": [5]}')
    assert "this has changed:\n  stop_tokens: 1 stop tokens (hash " in place.refusal()


def test_the_release_that_wrote_a_tokenizer_makes_no_difference(place: Place) -> None:
    settings = place.folder / "base" / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"transformers_version": "9.9"}
    settings.write_text(json.dumps(dict(reversed(content.items()))))
    assert place.resume().changed == ()


def test_held_out_prompts_that_were_trained_on_are_refused_whatever_is_accepted(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, range(6))).encode())
    place.write("held_out.jsonl", "".join(map(line, range(8, 14))).encode())
    said = place.refusal("resume.accept=[data, held_out]")
    assert said.startswith(
        "2 of the 6 held-out prompts were training prompts up to step 2 (the first is '8')"
    )


def test_they_are_still_refused_after_a_change_of_the_data(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, range(6))).encode())
    place.save(4, place.resume("resume.accept=[data]").provenance)
    place.write("held_out.jsonl", "".join(map(line, range(8, 14))).encode())
    assert "were training prompts up to step 4" in place.refusal("resume.accept=[held_out]")


def test_an_accepted_change_stays_in_the_record_and_is_not_asked_about_again(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, range(8))).encode())
    place.save(4, place.resume("resume.accept=[data]").provenance)
    found = place.resume()
    assert (found.said, found.changed) == ((), ())
    (remark,) = found.provenance.remarks
    assert remark.startswith("after step 2, data was changed on purpose: 10 training prompts (hash ")
    task = place.task("resume=true")
    note(RunFolder.of(task.config), found.provenance)
    (change,) = json.loads((place.folder / "runs/first/changes.json").read_text())
    assert (change["step"], change["part"]) == (2, "data")


def test_settings_that_went_with_an_accepted_change_are_in_the_record(place: Place) -> None:
    said = place.refusal("reward.timeout_s=3")
    assert "rewards: the same 3 source files of the reward; reward.timeout_s 10.0 there, 3.0 now" in said


def test_a_checkpoint_of_an_earlier_release_continues_and_says_so(place: Place) -> None:
    shutil.rmtree(place.checkpoint(2))
    store(place.checkpoint(2).parent, 2)
    place.write("prompts.jsonl", "".join(map(line, range(5))).encode())
    found = place.resume()
    assert found.changed == ()
    assert "step_000002 does not say what it was made with, as an earlier release wrote it" in found.said[0]
    assert found.provenance.parts["data"].count == 5


def test_a_setting_that_came_after_a_checkpoint_is_no_change(place: Place) -> None:
    record = place.checkpoint(2) / RECORD
    content = json.loads(record.read_text())
    assert content["parts"]["rewards"]["settings"].pop("reward.reasoning") == "drop"
    place.resize(RECORD, json.dumps(content).encode())
    assert place.resume().said == ()


def test_another_release_of_what_judges_is_a_change(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write(
        "my_rewards/judge.py", REWARD.replace("    def", "    packages = ('sympy',)\n    def").encode()
    )
    for name in [name for name in sys.modules if name.startswith("my_rewards")]:
        monkeypatch.delitem(sys.modules, name)
    provenance = Provenance.of(place.task())
    place.save(3, provenance)
    assert place.resume().said == ()
    monkeypatch.setattr(made_with, "version", lambda package: "0.1")
    assert f"sympy {version('sympy')} there, 0.1 now" in place.refusal()
    before = replace(provenance.parts["rewards"], releases={})
    place.save(4, replace(provenance, parts=provenance.parts | {"rewards": before}))
    assert place.resume().said == ()


def test_a_new_run_and_one_without_a_checkpoint_have_nothing_to_compare(place: Place) -> None:
    place.write("prompts.jsonl", "".join(map(line, range(5))).encode())
    assert continued(place.task()).said == ()
    shutil.rmtree(place.checkpoint(2))
    assert place.resume().said == ()


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b'{"parts": []}', b'{"parts": {"data": 3}}', b"\xff\xfe", b"[1]"]
)
def test_a_damaged_record_is_refused_by_its_path(place: Place, damage: bytes) -> None:
    place.resize("made_with.json", damage)
    assert "step_000002/made_with.json cannot be read (" in place.refusal()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY"])
def test_a_damaged_list_of_prompts_is_refused_by_its_path(place: Place, damage: bytes) -> None:
    place.resize(TRAINED_ON, damage)
    assert f"step_000002/{TRAINED_ON} cannot be read (" in place.refusal()
    (place.checkpoint(2) / TRAINED_ON).unlink()
    assert f"step_000002/{TRAINED_ON} is missing: the checkpoint is damaged" in place.refusal()


def test_a_record_reads_back_as_it_was_written(place: Place) -> None:
    written, found = Provenance.of(place.task()), read(place.checkpoint(2))
    assert found is not None
    assert found.parts == written.parts
    assert found.trained.tolist() == written.trained.tolist()


def test_a_large_file_is_hashed_by_blocks_over_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(digest, "BLOCKS", 8)
    monkeypatch.setattr(digest, "BLOCK_BYTES", 100)
    content = bytearray(np.random.default_rng(0).bytes(5000))
    hashes = set()
    for at in (None, 0, 700, 4999):
        if at is not None:
            content[at] ^= 1
        (tmp_path / "file").write_bytes(content)
        hashes.add(digest.of_file(tmp_path / "file"))
    (tmp_path / "file").write_bytes(content[:-1])
    hashes.add(digest.of_file(tmp_path / "file"))
    assert len(hashes) == 5


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("site-packages", {"mine/a.py", "mine/b.py"}), ("code", {"mine/a.py", "mine/b.py", "other.py"})],
)
def test_an_installed_plug_in_is_its_own_package_alone(
    tmp_path: Path, folder: str, expected: set[str]
) -> None:
    root = tmp_path / folder
    write_atomic(root / "mine" / "a.py", "import other\nfrom . import b\n")
    write_atomic(root / "mine" / "b.py", "")
    write_atomic(root / "other.py", "")
    assert digest.sources(root, "mine.a").keys() == expected
