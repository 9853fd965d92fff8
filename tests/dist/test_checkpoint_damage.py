"""Checkpoints with missing, damaged or changed files are refused before anything is loaded."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_troll.mcore.checkpoint import CheckpointError, Checkpoints
from megatron_troll.mcore.checkpoint_folder import MANIFEST, path_of
from megatron_troll.mcore.checkpoint_pickle import COMMON_OBJECT, METADATA, read_index
from megatron_troll.mcore.checkpoint_sums import SUMS, read_sums, sums_of, write_sums
from tests.dist.checkpoint_run import Run, fill, training, values_of
from tests.dist.harness import RankPool
from tests.dist.test_checkpoint_faults import load_filled, save_filled, save_now
from tests.dist.tiny import MOE, reference


@pytest.fixture(scope="module")
def alone() -> Run:
    return Run(dict(reference(MOE).state_dict()), {}, MOE)


@pytest.fixture(scope="module")
def pp2(alone: Run) -> Run:
    return Run(alone.weights, {"pp": 2}, MOE)


@pytest.fixture(scope="module")
def two_steps(alone: Run, ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-steps")
    ranks1.run(save_filled, alone, str(folder), [(1, None), (2, None)])
    return folder


def refused(run: Run, folder: str, name: str, step: Any) -> str:
    """Why loading fails, before any weight has changed."""
    with training(run) as trained:
        fill(trained, 5.0)
        with pytest.raises(CheckpointError) as caught:
            Checkpoints(folder, {name: trained}).load(step)
        assert values_of(trained) == {5.0}
        return str(caught.value)


def test_a_missing_checkpoint_is_refused(
    alone: Run, two_steps: Path, ranks1: RankPool, tmp_path: Path
) -> None:
    (message,) = ranks1.run(refused, alone, str(tmp_path / "nowhere"), "policy", "latest")
    assert "no complete checkpoint in" in message
    (message,) = ranks1.run(refused, alone, str(two_steps), "policy", 7)
    assert "step_000007 does not exist; load one of the usable steps: 1, 2" in message


def test_another_model_is_refused(alone: Run, two_steps: Path, ranks1: RankPool) -> None:
    config = MOE | {"vocab_size": 137}
    other = Run(dict(reference(config).state_dict()), {}, config)
    (message,) = ranks1.run(refused, other, str(two_steps), "policy", "latest")
    assert "vocab 131 there, 137 here" in message
    assert "policy.embedding.word_embeddings.weight is (131, 48) there and (137, 48) here" in message
    (message,) = ranks1.run(refused, alone, str(two_steps), "critic", "latest")
    assert "holds the models ['policy'], this run trains ['critic']" in message


def test_a_truncated_file_is_refused_and_the_usable_step_named(
    alone: Run, ranks1: RankPool, tmp_path: Path
) -> None:
    ranks1.run(save_filled, alone, str(tmp_path), [(1, None), (2, None)])
    damaged = sorted(path_of(tmp_path, 2).rglob("*.distcp"))[0]
    os.truncate(damaged, damaged.stat().st_size - 1)
    (message,) = ranks1.run(refused, alone, str(tmp_path), "policy", "latest")
    assert str(damaged) in message
    assert "load one of the usable steps: 1" in message
    assert ranks1.run(load_filled, alone, str(tmp_path), 1) == [(1, {1.0})]


def test_garbage_of_the_right_size_is_an_error(alone: Run, ranks1: RankPool, tmp_path: Path) -> None:
    ranks1.run(save_filled, alone, str(tmp_path), [(1, None)])
    (file,) = path_of(tmp_path, 1).rglob("*.distcp")
    whole = file.read_bytes()
    index = read_index(file.parent / METADATA)
    start = index.storage_data[MetadataIndex(COMMON_OBJECT)].length
    file.write_bytes(whole[:start] + bytes(len(whole) - start))
    sum_again(path_of(tmp_path, 1))
    with pytest.raises(RuntimeError, match="failed half-way, so that the models in memory are lost"):
        ranks1.run(load_filled, alone, str(tmp_path))
    file.write_bytes(bytes(len(whole)))
    (message,) = ranks1.run(refused, alone, str(tmp_path), "policy", "latest")
    assert str(file) in message
    assert "it is not what torch.save writes" in message


def sum_again(step: Path) -> None:
    write_sums(step, sums_of(step, [name for name in read_sums(step) or () if (step / name).is_file()]))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_changed_bit_of_any_file_is_found_before_anything_is_loaded(
    asynchronous: bool, pp2: Run, ranks2: RankPool, tmp_path: Path
) -> None:
    ranks2.run(save_twice, pp2, str(tmp_path), asynchronous)
    step = path_of(tmp_path, 2)
    assert list(step.glob(".sums*")) == []
    sums = read_sums(step) or {}
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.name != SUMS)
    assert sorted(sums) == [str(path.relative_to(step)) for path in files]
    assert {path.name.partition("_")[0] for path in files} >= {"", ".metadata", "checkpoint.json", "rng"}
    for file in files:
        content = bytearray(file.read_bytes())
        flip = content.copy()
        # The sign of a number of the optimizer, or a digit: nothing else would notice.
        flip[-len(flip) // 3] ^= 1
        file.write_bytes(flip)
        messages = ranks2.run(refused, pp2, str(tmp_path), "policy", "latest")
        assert str(file) in messages[0]
        assert messages[0] == messages[1]
        file.write_bytes(content)
    assert ranks2.run(load_filled, pp2, str(tmp_path)) == [(2, {2.0})] * 2


def save_twice(run: Run, folder: str, asynchronous: bool) -> None:
    with training(run) as trained:
        checkpoints = Checkpoints(folder, {"policy": trained}, asynchronous=asynchronous)
        for step in (1, 2):
            fill(trained, step)
            save_now(checkpoints, step)


def test_lost_sums_are_told_and_older_checkpoints_need_none(
    alone: Run, ranks1: RankPool, tmp_path: Path
) -> None:
    ranks1.run(save_filled, alone, str(tmp_path), [(1, None)])
    step = path_of(tmp_path, 1)
    (step / SUMS).unlink()
    (message,) = ranks1.run(refused, alone, str(tmp_path), "policy", "latest")
    assert f"{step / SUMS} is missing: the checkpoint is damaged" in message
    manifest = json.loads((step / MANIFEST).read_text())
    del manifest["sums"]
    (step / MANIFEST).write_text(json.dumps(manifest))
    ((loaded, said),) = ranks1.run(load_and_hear, alone, str(tmp_path))
    assert loaded == 1
    assert said == [f"{step} has no checksums: its content is not checked"]


def load_and_hear(run: Run, folder: str) -> tuple[int, list[str]]:
    """The step that was loaded, and the warnings of the load."""
    said: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, handler = logging.getLogger("megatron_troll.mcore.checkpoint"), Kept()
    log.addHandler(handler)
    try:
        return load_filled(run, folder)[0], said
    finally:
        log.removeHandler(handler)
