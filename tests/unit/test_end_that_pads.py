"""SmolLM2 pads with the token that ends a turn: it stops answers, and carries loss where it was sampled."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_troll.batching.build import Form, build
from megatron_troll.config.load import load
from megatron_troll.mcore.kv_cache import Prefix
from megatron_troll.rollout.engine import Request, Setup, rollout_of
from megatron_troll.rollout.engines.drawing import Drawn, UnderWay, completions
from megatron_troll.task import Task, demonstrations, prepare
from megatron_troll.types import Rollout
from tests.unit.demo_task import write_config

CONFIG = """
name: trial
models: {{policy: {{path: {base}, init: random, layout: {{tp: 1, ep: 1}}}}}}
data: {{files: [{prompts}], held_out: 2, max_prompt_tokens: 32}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
sft: {{files: [{prompts}.jsonl]}}
"""
END = 4  # <|end|>


@pytest.fixture
def task(base: Path, tmp_path: Path) -> Task:
    """The demo's, with its end token as its padding."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    for name, change in (
        ("tokenizer_config.json", {"pad_token": "<|end|>"}),
        ("config.json", {"pad_token_id": END}),
        ("generation_config.json", {"pad_token_id": END}),
    ):
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(told | change))
    config = write_config(CONFIG, folder, tmp_path)
    turns = [{"role": "user", "content": "sort 21"}, {"role": "assistant", "content": "12"}]
    (tmp_path / "prompts.jsonl.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    made = prepare(load(config))
    assert made.tokenizer.pad_token_id == made.tokenizer.eos_token_id == END
    return made


def carry_loss(rollout: Rollout, other: Rollout, packed: bool) -> list[int]:
    """The tokens of `rollout` that carry loss, in a micro-batch with a longer one."""
    batch = build([rollout, other], [1.0, 1.0], [1.0, 1.0], [0, 1], Form(vocab=64, packed=packed))
    return batch.target[batch.sequence == 0].tolist()


def sampled(task: Task, ids: list[int]) -> Rollout:
    """The rollout of an answer for which the engine draws `ids`."""
    rows, steps = UnderWay(1, torch.device("cpu")), []
    rows.add(0, Prefix(0, 0))
    for index in ids:
        steps.append(Drawn(tuple(rows.requests), torch.tensor([index]), torch.tensor([-0.5])))
        if rows.take(steps[-1].token, task.stop_ids, len(ids)):
            break
    (answer,) = completions(steps, rows.counts, task.stop_ids, version=0)
    prompt = task.prompts.train[0]
    setup = Setup(task.config, None, Path(), task.tokenizer, task.stop_ids)  # pyright: ignore[reportArgumentType]
    request = Request(prompt, 0, 0, prompt.ids.astype(np.int64))
    return rollout_of(setup, request, answer, task.config.rollout.sampling, round=1)


@pytest.mark.parametrize("packed", [True, False])
def test_an_end_that_was_sampled_carries_loss(task: Task, packed: bool) -> None:
    assert task.stop_ids == (END,)
    short, long = sampled(task, [20, 21, END, END, END]), sampled(task, [20, 21, 22, 23, 24])
    assert (short.response_ids.tolist(), short.finish) == ([20, 21, END], "stop")
    assert short.text == task.tokenizer.decode([20, 21])
    assert carry_loss(short, long, packed) == [20, 21, END]
    assert (long.response_ids.tolist(), long.finish) == ([20, 21, 22, 23, 24], "length")
    assert carry_loss(long, short, packed) == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("packed", [True, False])
def test_the_end_of_a_demonstration_carries_loss(task: Task, packed: bool) -> None:
    (example,) = demonstrations(task).examples
    answer = task.tokenizer.encode("12", add_special_tokens=False)
    assert carry_loss(example, sampled(task, [20] * 30), packed) == [*answer, END]
    # The end of the user's turn, the same token, carries none.
    assert example.response_ids.tolist().count(END) == 2
