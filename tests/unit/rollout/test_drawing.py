"""The in-process engine's book-keeping, on a model whose logits are a hash of all tokens that a row has read:
a row, prefix or draw that is mixed up gives other tokens than drawing each request by itself."""

import heapq
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.batching.uniforms import uniforms
from megatron_troll.config import Config, Model, Models, RolloutConfig, Sampling, Train
from megatron_troll.data.demo_model import END, character_tokenizer
from megatron_troll.mcore.kv_cache import Prefix
from megatron_troll.parallel.groups import Groups
from megatron_troll.rollout.engine import Request, Setup
from megatron_troll.rollout.engines import drawing, inprocess
from megatron_troll.rollout.sampling import sample, sample_key
from megatron_troll.types import Prompt, Rollout

TOKENIZER = character_tokenizer()
VOCAB, EXPERTS, LIMIT, ROUND = len(TOKENIZER), 8, 6, 2
STOPS = tuple(TOKENIZER.encode(f"{END}7k"))
SAMPLING = Sampling(max_tokens=LIMIT)
# (tokens of the prompt, samples) of each group.
GROUPS = ((3, 1), (5, 2), (9, 7), (4, 16), (1, 3))


def logits_after(ids: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.random.default_rng([len(ids), *ids]).normal(size=VOCAB)).float()


def expert_of(ids: Sequence[int]) -> int:
    """Of the last of the tokens."""
    return int(np.random.default_rng([99, *ids]).integers(EXPERTS))


@dataclass
class Read(Prefix):
    """A prompt that was read."""

    ids: list[int] = field(default_factory=list)


class FakeDecoder:
    """Rows that are lists of tokens; `prompts`: the lengths of those that each forward read; `alive`: (rows
    begun before, prefixes that are still held) of each."""

    made: "FakeDecoder"

    def __init__(self, model: Any, rows: int, max_length: int, kv_cache: str) -> None:
        self.size, self.max_length, self.cache = rows, max_length, self
        self.rows: list[list[int]] = []
        self.tokens_read = 0
        self.experts: list[Tensor] = []
        self.prompts: list[list[int]] = []
        self.begun = 0
        self.held: list[weakref.ref[Read]] = []
        self.alive: list[tuple[int, int]] = []
        FakeDecoder.made = self

    def extend(self, prompts: Sequence[np.ndarray], tokens: Tensor) -> tuple[list[Read], Tensor]:
        self.held = [prefix for prefix in self.held if prefix() is not None]
        self.alive.append((self.begun, len(self.held)))
        prefixes, experts = [], []
        for prompt in prompts:
            ids = prompt.tolist()
            prefixes.append(Read(len(ids), self.tokens_read, hidden=logits_after(ids), ids=ids))
            experts += [expert_of(ids[: i + 1]) for i in range(len(ids))]
            self.tokens_read += len(ids)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
            assert len(row) <= self.max_length
        experts += map(expert_of, self.rows)
        self.tokens_read += len(self.rows)
        self.experts.append(torch.tensor(experts)[:, None])
        self.prompts.append([len(prompt) for prompt in prompts if prompt is not inprocess.NOTHING])
        return prefixes, torch.stack([*map(logits_after, self.rows), torch.zeros(VOCAB)])[:-1]

    def add(self, prefix: Read) -> None:
        self.rows.append([*prefix.ids])
        self.begun += 1
        self.held += [weakref.ref(prefix)] * (weakref.ref(prefix) not in self.held)
        assert len(self.rows) <= self.size

    def remove(self, row: int) -> None:
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


@contextmanager
def recorded(chunks: Any) -> Iterator[dict[int, list[Tensor]]]:
    yield {0: FakeDecoder.made.experts} if chunks else {}


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the engine that need a real model."""
    monkeypatch.setattr(inprocess, "Decoder", FakeDecoder)
    monkeypatch.setattr(inprocess, "Head", lambda model: SimpleNamespace(logits=lambda hidden: hidden))
    monkeypatch.setattr(inprocess, "recording", recorded)


def requests(groups: Sequence[tuple[int, int]]) -> list[Request]:
    generator = np.random.default_rng(1)
    prompts = [generator.integers(5, VOCAB, length) for length, _ in groups]
    return [
        Request(Prompt(f"p{group}", (), ""), group, i, ids)
        for group, (ids, (_, samples)) in enumerate(zip(prompts, groups))
        for i in range(samples)
    ]


def generate(asked: Sequence[Request], places: int) -> tuple[list[Rollout], FakeDecoder]:
    config = Config(
        name="run",
        models=Models(policy=Model(path="unused")),
        rollout=RolloutConfig(max_sequences=places, top_k=3),
        train=Train(replay="rollout"),
    )
    model: Any = SimpleNamespace(
        groups=Groups(),
        shape=SimpleNamespace(vocab=VOCAB),
        chunks=[torch.nn.Identity()],
        config=SimpleNamespace(),
    )
    engine = inprocess.InProcessEngine(Setup(config, model, Path("unused"), TOKENIZER, STOPS))
    return engine.generate(asked, SAMPLING, ROUND), FakeDecoder.made


def alone(request: Request) -> list[int]:
    """The answer to a request that is drawn by itself."""
    key, answer = sample_key(0, ROUND, request.prompt.id, request.sample), list[int]()
    while len(answer) < LIMIT and not (answer and answer[-1] in STOPS):
        logp = logits_after([*request.prompt_ids.tolist(), *answer]).log_softmax(-1)
        uniform = torch.from_numpy(uniforms([key], len(answer)))
        answer.append(int(sample(logp[None], uniform, SAMPLING)))
    return answer


def forwards(lengths: Sequence[int], places: int) -> int:
    """How many there are if each place is taken again at once."""
    free = [0] * places
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


@pytest.mark.parametrize("places", [1, 3, 8, 100])
def test_every_request_gets_the_answer_that_it_gets_by_itself(places: int) -> None:
    asked = requests(GROUPS)
    rollouts, decoder = generate(asked, places)
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    for request, rollout in zip(asked, rollouts, strict=True):
        answer, prompt = alone(request), request.prompt_ids.tolist()
        assert rollout.name == f"{request.prompt.id}#{request.sample}"
        assert rollout.response_ids.tolist() == answer
        assert rollout.finish == ("stop" if answer[-1] in STOPS else "length")
        read = [*prompt, *answer][:-1]
        assert rollout.experts is not None
        assert rollout.experts[:, 0, 0].tolist() == [expert_of(read[: i + 1]) for i in range(len(read))]
        laws = torch.stack([logits_after([*prompt, *answer[:i]]) for i in range(len(answer))]).log_softmax(-1)
        torch.testing.assert_close(torch.from_numpy(rollout.logp), laws[range(len(answer)), answer])
        assert rollout.topk is not None
        assert rollout.topk.ids.tolist() == laws.topk(3).indices.tolist()
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    assert len(decoder.prompts) == forwards(lengths, places)


@pytest.mark.parametrize("places", [1, 3, 100])
def test_a_prompt_is_read_once_and_held_while_a_sample_of_it_waits(places: int) -> None:
    asked = requests(GROUPS)
    _, decoder = generate(asked, places)
    assert [length for read in decoder.prompts for length in read] == [length for length, _ in GROUPS]
    for begun, held in decoder.alive:
        waits = 0 < begun < len(asked) and asked[begun].group == asked[begun - 1].group
        assert held == waits
    assert any(held for _, held in decoder.alive) == (places < 100)


def test_only_neighbours_share_a_prompt() -> None:
    first, second = requests([(4, 1), (6, 1)])
    rollouts, decoder = generate([first, second, first], 3)
    assert decoder.prompts[0] == [4, 6, 4]
    assert [rollout.response_ids.tolist() for rollout in rollouts] == [*map(alone, (first, second, first))]


@pytest.mark.parametrize("most", [1, 9, 10, 14, 1000])
def test_a_forward_reads_no_more_tokens_of_prompts_than_fit(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for one prompt that is longer."""
    monkeypatch.setattr(drawing, "PROMPT_TOKENS", most)
    asked = requests(GROUPS * 20)
    rollouts, decoder = generate(asked, 1000)
    assert [rollout.response_ids.tolist() for rollout in rollouts] == [*map(alone, asked)]
    for read, following in pairwise(decoder.prompts):
        assert sum(read) <= most or len(read) == 1
        # As many as fit: the next would not have.
        assert not following or sum(read) + following[0] > most
    assert sum(map(len, decoder.prompts)) == len(GROUPS) * 20


def test_without_requests_there_is_nothing_to_read() -> None:
    rollouts, decoder = generate([], 4)
    assert (rollouts, decoder.prompts) == ([], [])
