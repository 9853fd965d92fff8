"""Rollouts on disk, read back exactly as written: arrays in NAME.npz, the rest in NAME.json, nothing pickled.
Of a prompt only the id is stored, because the run's own files contain the prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_troll.batching.uniforms import key_of
from megatron_troll.data.rows import DataError
from megatron_troll.types import Prompt, Rollout, TokenTopK, marked

PER_TOKEN = ("response_ids", "marks", "logp")
RECORDS = {"topk_ids", "topk_logp", "experts"}
PLAIN = ("group", "sample", "text", "finish", "temperature")


def write(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write to `path` (no suffix). Raises ValueError if only some have experts or a top-K, or K differs."""
    arrays = {
        "prompt_ids": _joined([rollout.prompt_ids for rollout in rollouts]),
        "prompt_ends": np.cumsum([len(rollout.prompt_ids) for rollout in rollouts], dtype=np.int64),
        "ends": np.cumsum([len(rollout.response_ids) for rollout in rollouts], dtype=np.int64),
        "keys": np.array([rollout.key for rollout in rollouts], dtype=np.uint64),
    }
    arrays |= {name: _joined([getattr(rollout, name) for rollout in rollouts]) for name in PER_TOKEN}
    records = [rollout.topk for rollout in rollouts if rollout.topk is not None]
    if records:
        if len(records) < len(rollouts) or len({record.ids.shape[1] for record in records}) > 1:
            raise ValueError(
                "some rollouts of a batch have no top-K, or one whose size differs from that of the rest"
            )
        arrays["topk_ids"] = np.concatenate([record.ids for record in records])
        arrays["topk_logp"] = np.concatenate([record.logp for record in records])
    experts = [rollout.experts for rollout in rollouts if rollout.experts is not None]
    if experts:
        if len(experts) < len(rollouts):
            raise ValueError("some rollouts of a batch have no record of their experts")
        arrays["experts"] = np.concatenate(experts)
        arrays["experts_ends"] = np.cumsum([len(each) for each in experts], dtype=np.int64)
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **arrays)
    plain = [
        {"prompt": rollout.prompt.id} | {name: getattr(rollout, name) for name in PLAIN}
        for rollout in rollouts
    ]
    path.with_suffix(".json").write_text(json.dumps(plain))


def read(path: Path, prompts: Mapping[str, Prompt], *, elsewhere: bool = False) -> list[Rollout]:
    """Read what `write` wrote; `prompts` by their ids. `elsewhere`: leave top-K and experts to rank 0, if
    there are some (`Rollout.elsewhere`). Raises DataError for a prompt not among them, ValueError for arrays
    that no version has written."""
    plain = json.loads(path.with_suffix(".json").read_text())
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        recorded = bool({*file.files} & RECORDS)
        arrays = {name: file[name] for name in file.files if not (elsewhere and name in RECORDS)}
    if "marks" not in arrays:
        _modernise(arrays)
    questions = np.split(arrays["prompt_ids"], arrays["prompt_ends"][:-1])
    per_token = {name: np.split(arrays[name], arrays["ends"][:-1]) for name in PER_TOKEN}
    records, experts = _records(arrays, len(plain)), _experts(arrays, len(plain))
    return [
        Rollout(
            prompt=_prompt(fields.pop("prompt"), prompts, path),
            prompt_ids=questions[i],
            key=int(arrays["keys"][i]),
            topk=records[i],
            experts=experts[i],
            elsewhere=elsewhere and recorded,
            **{name: parts[i] for name, parts in per_token.items()},
            **fields,
        )
        for i, fields in enumerate(plain)
    ]


def _modernise(arrays: dict[str, np.ndarray]) -> None:
    """Turn the arrays of older files into today's: they had wider ids, and mask, versions and random numbers
    of every token."""
    for name in ("prompt_ids", "response_ids"):
        arrays[name] = arrays[name].astype(np.int32)
    arrays["marks"] = marked(arrays.pop("mask"), arrays.pop("versions"))
    uniform = np.split(arrays.pop("uniform"), arrays["ends"][:-1])
    arrays["keys"] = np.array([key_of(each) for each in uniform], dtype=np.uint64)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)


def _records(arrays: Mapping[str, np.ndarray], count: int) -> Sequence[TokenTopK | None]:
    if "topk_ids" not in arrays:
        return [None] * count
    ids, logp = (np.split(arrays[name], arrays["ends"][:-1]) for name in ("topk_ids", "topk_logp"))
    return [TokenTopK(*pair) for pair in zip(ids, logp)]


def _experts(arrays: Mapping[str, np.ndarray], count: int) -> Sequence[np.ndarray | None]:
    if "experts" not in arrays:
        return [None] * count
    return np.split(arrays["experts"], arrays["experts_ends"][:-1])


def _prompt(name: Any, prompts: Mapping[str, Prompt], path: Path) -> Prompt:
    if name not in prompts:
        raise DataError(f"{path}.json: prompt {name!r} is not among the run's training prompts")
    return prompts[name]
