"""Rollouts come back from disk exactly as they were."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_troll.batching.uniforms import token_uniforms
from megatron_troll.data.rows import DataError
from megatron_troll.rollout import archive
from megatron_troll.types import Message, Prompt, Rollout, TokenTopK, marked

PROMPTS = {name: Prompt(name, (Message("user", name),), "7") for name in ("a", "b")}


def rollout(prompt: str, sample: int, length: int, k: int = 3) -> Rollout:
    rng = np.random.default_rng([length, sample])
    ids = rng.integers(0, 50, (length, k)).astype(np.int32)
    return Rollout(
        prompt=PROMPTS[prompt],
        group=list(PROMPTS).index(prompt),
        sample=sample,
        prompt_ids=rng.integers(0, 50, 4 + sample).astype(np.int32),
        response_ids=rng.integers(0, 50, length).astype(np.int32),
        marks=marked(rng.integers(0, 2, length), rng.integers(0, 12, length)),
        logp=np.where(rng.random(length) < 0.2, -np.inf, rng.standard_normal(length)).astype(np.float32),
        key=int(rng.integers(0, 2**64, dtype=np.uint64)),
        topk=TokenTopK(ids, rng.standard_normal((length, k)).astype(np.float32)),
        text="13579 \N{SNOWMAN} \ud800",
        finish="length",
        temperature=0.7,
    )


BATCH = [rollout("a", 0, 5), rollout("a", 1, 0), rollout("b", 0, 7)]


def with_experts(one: Rollout) -> Rollout:
    tokens = max(0, len(one.prompt_ids) + len(one.response_ids) - 1)
    return replace(one, experts=np.arange(tokens * 6).reshape(tokens, 3, 2).astype(np.uint8))


def assert_same(one: Rollout, other: Rollout) -> None:
    for name, value in vars(one).items():
        there = getattr(other, name)
        if isinstance(value, TokenTopK):
            assert_arrays(value.ids, there.ids)
            assert_arrays(value.logp, there.logp)
        elif isinstance(value, np.ndarray):
            assert_arrays(value, there)
        else:
            assert value == there, name


def assert_arrays(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def test_every_field_comes_back_to_the_bit(tmp_path: Path) -> None:
    archive.write(tmp_path / "batch", BATCH)
    read = archive.read(tmp_path / "batch", PROMPTS)
    assert len(read) == len(BATCH)
    for one, other in zip(BATCH, read):
        assert_same(one, other)


def test_rollouts_without_top_k_come_back_without(tmp_path: Path) -> None:
    archive.write(tmp_path / "batch", [replace(one, topk=None) for one in BATCH])
    assert [one.topk for one in archive.read(tmp_path / "batch", PROMPTS)] == [None] * 3


@pytest.mark.parametrize("odd", [rollout("b", 1, 4, k=2), replace(BATCH[0], topk=None)])
def test_top_k_of_different_sizes_are_refused(tmp_path: Path, odd: Rollout) -> None:
    with pytest.raises(ValueError, match="size differs"):
        archive.write(tmp_path / "batch", [*BATCH, odd])


def test_a_prompt_that_has_gone_is_named(tmp_path: Path) -> None:
    archive.write(tmp_path / "batch", BATCH)
    with pytest.raises(DataError, match=r"batch\.json: prompt 'b' is not among"):
        archive.read(tmp_path / "batch", {"a": PROMPTS["a"]})


def test_experts_come_back_to_the_bit(tmp_path: Path) -> None:
    batch = [with_experts(one) for one in BATCH]
    archive.write(tmp_path / "batch", batch)
    for one, other in zip(batch, archive.read(tmp_path / "batch", PROMPTS), strict=True):
        assert_same(one, other)


def test_experts_of_some_rollouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record of their experts"):
        archive.write(tmp_path / "batch", [with_experts(BATCH[0]), *BATCH[1:]])


def test_a_rollout_costs_12_bytes_a_token_and_8_an_entry_as_on_disk(tmp_path: Path) -> None:
    archive.write(tmp_path / "batch", BATCH)
    for batch in (BATCH, archive.read(tmp_path / "batch", PROMPTS)):
        tokens = sum(len(one.response_ids) for one in batch)
        held = sum(one.response_ids.nbytes + one.marks.nbytes + one.logp.nbytes for one in batch)
        assert held == 12 * tokens
        assert sum(one.topk.ids.nbytes + one.topk.logp.nbytes for one in batch if one.topk) == 8 * 3 * tokens
    arrays = [value for value in vars(BATCH[0]).values() if isinstance(value, np.ndarray)]
    assert sum(map(len, arrays)) == 3 * len(BATCH[0].response_ids) + len(BATCH[0].prompt_ids)


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """They had int64 ids, and the mask, the version and the random number of every token."""
    archive.write(tmp_path / "batch", BATCH)
    with np.load(tmp_path / "batch.npz") as file:
        arrays = dict(file)
    del arrays["marks"], arrays["keys"]
    arrays |= {name: arrays[name].astype(np.int64) for name in ("prompt_ids", "response_ids")}
    arrays["mask"] = np.concatenate([one.mask for one in BATCH]).astype(np.float32)
    arrays["versions"] = np.concatenate([one.versions for one in BATCH]).astype(np.int64)
    arrays["uniform"] = np.concatenate([token_uniforms(one.key, len(one.response_ids)) for one in BATCH])
    np.savez(tmp_path / "batch.npz", allow_pickle=False, **arrays)
    for one, other in zip(BATCH, archive.read(tmp_path / "batch", PROMPTS), strict=True):
        assert_same(replace(one, key=other.key), other)
        uniform = (token_uniforms(each.key, len(each.response_ids)) for each in (one, other))
        assert_arrays(*uniform)
