"""Dynamic sampling with an engine whose prompts are always, never or sometimes answered right."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_troll.config import RewardConfig, RolloutConfig, Sampling
from megatron_troll.data.chat import tokenized
from megatron_troll.data.curriculum import Curricula
from megatron_troll.data.demo_model import write_base
from megatron_troll.data.mixture import MixtureOrder, SourcePrompts
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.parallel.groups import Groups
from megatron_troll.rewards.score import Scorer
from megatron_troll.rollout.engine import Request
from megatron_troll.run.collect import RolloutBatch, begin, chosen, collect, informative
from megatron_troll.types import Message, Prompt, Rollout, marked

SAMPLES = 4


@dataclass
class Fake:
    """Answers an `always` prompt right, a `never` prompt wrong, and others every second time."""

    asked: list[list[str]] = field(default_factory=list)
    generates_elsewhere: bool = False
    awaited: int = 0

    def start(
        self, requests: Sequence[Request], sampling: Sampling, round: int
    ) -> Callable[[], list[Rollout]]:
        rollouts = self.generate(requests, sampling, round)

        def finish() -> list[Rollout]:
            self.awaited += 1
            return rollouts

        return finish

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        self.asked.append([f"{request.prompt.id}#{request.sample}" for request in requests])
        return [self._answer(request, round) for request in requests]

    def _answer(self, request: Request, round: int) -> Rollout:
        kind = request.prompt.id.split("-")[0]
        right = kind == "always" or (kind != "never" and request.sample % 2 == 0)
        token = np.ones(1)
        return Rollout(
            prompt=request.prompt,
            group=request.group,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            response_ids=token,
            marks=marked(np.ones(1), np.full(1, round)),
            logp=token,
            key=0,
            topk=None,
            text="12" if right else "21",
            finish="stop",
            temperature=1.0,
        )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("base")
    write_base(folder)
    return load_tokenizer(folder)


@pytest.fixture
def run(tokenizer: Any) -> Callable[..., Any]:
    """What `collect` reads of a run on prompts of these kinds, drawn in this order."""

    def make(kinds: Sequence[str], prompts: int, refill: int) -> Any:
        chats = [Prompt(f"{kind}-{i}", (Message("user", f"sort {i}"),), "12") for i, kind in enumerate(kinds)]
        train = tokenized(chats, ChatTemplate(tokenizer))
        config = RolloutConfig(prompts=prompts, samples=SAMPLES, refill=refill)
        return SimpleNamespace(
            task=SimpleNamespace(
                config=SimpleNamespace(rollout=config),
                tokenizer=tokenizer,
            ),
            session=SimpleNamespace(
                phases=lambda name: nullcontext(), groups=Groups(), progress=SimpleNamespace(say=print)
            ),
            engine=Fake(),
            scorer=Scorer(RewardConfig(name="exact")),
            order=MixtureOrder([SourcePrompts("", 1.0, (tuple(train),), ())], seed=0, shuffle=False),
            curricula=Curricula([]),
        )

    return make


def prompts_of(collected: RolloutBatch) -> list[str]:
    return [rollout.prompt.id for rollout in collected.rollouts[::SAMPLES]]


def test_without_refill_the_batch_is_what_was_drawn(run: Callable[..., Any]) -> None:
    job = run(["always", "mixed", "never", "mixed", "mixed"], prompts=4, refill=0)
    collected = collect(job, step=1)
    assert prompts_of(collected) == ["always-0", "mixed-1", "never-2", "mixed-3"]
    assert (collected.kept.all(), job.order.position, len(job.engine.asked)) == (True, 4, 1)
    assert collected.reward.tolist() == [1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0]


def test_prompts_that_teach_nothing_are_replaced(run: Callable[..., Any]) -> None:
    job = run(["always", "mixed", "never", "mixed", "always", "mixed", "mixed", "mixed"], prompts=4, refill=3)
    collected = collect(job, step=1)
    assert prompts_of(collected) == ["mixed-1", "mixed-3", "mixed-5", "mixed-6"]
    assert [len(asked) for asked in job.engine.asked] == [16, 8, 4]
    assert job.order.position == 7
    assert collected.metrics["refill_rounds"] == 2
    assert collected.metrics["dropped_groups"] == pytest.approx(3 / 7)
    assert collected.metrics["sampled_responses"] == 28
    assert collected.metrics["success"] == pytest.approx((2 * 1 + 0 + 4 * 0.5) / 7)


def test_groups_count_from_0_and_their_samples_stand_together(run: Callable[..., Any]) -> None:
    collected = collect(run(["always", "mixed", "mixed", "mixed"], prompts=3, refill=1), step=5)
    assert [rollout.group for rollout in collected.rollouts] == [0] * 4 + [1] * 4 + [2] * 4
    assert [rollout.sample for rollout in collected.rollouts] == [0, 1, 2, 3] * 3
    assert {int(rollout.versions[0]) for rollout in collected.rollouts} == {5}
    assert len(collected.reward) == len(collected.rollouts)


def test_when_the_rounds_are_spent_the_batch_is_filled_with_what_is_there(run: Callable[..., Any]) -> None:
    job = run(["always", "never", "always", "mixed", "never", "mixed"], prompts=3, refill=1)
    collected = collect(job, step=1)
    assert prompts_of(collected) == ["always-0", "mixed-3", "mixed-5"]
    assert len(collected.sampled.rollouts) == 6 * SAMPLES


def test_all_prompts_may_teach_nothing(run: Callable[..., Any]) -> None:
    collected = collect(run(["always"] * 9, prompts=2, refill=3), step=1)
    assert prompts_of(collected) == ["always-0", "always-1"]
    assert (collected.rounds, len(collected.kept)) == (4, 8 * SAMPLES)


def test_a_prompt_met_again_in_the_same_step_draws_new_samples(run: Callable[..., Any]) -> None:
    job = run(["always", "mixed"], prompts=2, refill=1)
    collect(job, step=1)
    assert job.engine.asked[1:] == [[f"always-0#{sample}" for sample in range(4, 8)]]
    assert job.order.position == 3


def test_the_next_step_goes_on_behind_what_was_drawn(run: Callable[..., Any]) -> None:
    """The position is all that a resumed run is told."""
    kinds = ["always", "mixed", "mixed", "mixed", "mixed", "never", "mixed", "mixed"]
    first = run(kinds, prompts=2, refill=2)
    collect(first, step=1)
    resumed = run(kinds, prompts=2, refill=2)
    resumed.order.seek(first.order.position)
    assert (
        prompts_of(collect(resumed, step=2)) == prompts_of(collect(first, step=2)) == ["mixed-3", "mixed-4"]
    )


def test_what_informs_and_what_fills_up() -> None:
    reward = np.array([1, 1, 0, 1, -1, -1, 0.5, 0.25], dtype=np.float32)
    assert informative(reward, 2).tolist() == [False, True, False, True]
    assert informative(reward, 4).tolist() == [True, True]
    informs = np.array([False, True, False, False, True])
    assert chosen(informs, 2).tolist() == [False, True, False, False, True]
    assert chosen(informs, 4).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("elsewhere", "refill", "under_way"), [(False, 0, False), (True, 0, True), (True, 1, False)]
)
def test_a_batch_goes_on_behind_where_the_engine_draws_elsewhere(
    run: Callable[..., Any], elsewhere: bool, refill: int, under_way: bool
) -> None:
    """With refill, what is asked depends on what came."""
    kinds = ["mixed", "always", "mixed", "mixed"]
    job, same = run(kinds, 2, refill), run(kinds, 2, refill)
    job.engine.generates_elsewhere = elsewhere
    waiting = begin(job, step=3, trained=2)
    assert (waiting.trained, waiting.position) == (2, 0)
    assert (waiting.batch is None, job.engine.awaited == 0) == (under_way, under_way)
    expected = collect(same, step=3)
    batch = waiting.wait()
    assert prompts_of(batch) == prompts_of(expected)
    assert batch.reward.tolist() == expected.reward.tolist()
    assert batch.metrics == expected.metrics
    assert [r.group for r in batch.rollouts] == [r.group for r in expected.rollouts]
    assert job.order.position == same.order.position
    assert waiting.wait() is batch
