"""A batch under way behind the main thread, and what a run that is continued finds of it."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.client import Client, NamedRequest
from megatron_troll.rollout.sglang.generation import GenerationBatch, Origin, start_of
from megatron_troll.rollout.sglang.http import Http, Refused
from megatron_troll.rollout.sglang.journal import Journal, Stored
from megatron_troll.rollout.sglang.servers import ServerPool
from tests.sglang.asking import VERSIONS, checker
from tests.unit.rollout.sglang.asking import config, questions, until
from tests.unit.rollout.sglang.fake import TOKENS, Fake, fakes, refused, together

ORIGIN = Origin("the model", unchecked=False)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fakes(1) as (server,):
        server.version = VERSIONS.called(1)
        yield server


class Desk(SimpleNamespace):
    """An event loop and a client of one server, as rank 0 has them."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.background.close()


def connection(fake: Fake) -> Any:
    background = Background()

    async def client() -> Client:
        http = Http(None)
        servers = ServerPool(config(concurrency=1), lambda: [fake.url], checker(http))
        await servers.want(VERSIONS.called(1))
        return Client(config(concurrency=1), http, servers, VERSIONS)

    return Desk(background=background, client=background.run(client()))


def test_it_goes_on_while_the_main_thread_does_something_else(fake: Fake) -> None:
    with connection(fake) as at:
        drawing = GenerationBatch(questions(6), round=1, journal=None, origin=ORIGIN)
        drawing.begin(at)
        until(lambda: len(drawing.answers) == 6)
        assert drawing.complete(at)
    assert [drawing.answers[i].ids.tolist() for i in range(6)] == [TOKENS] * 6
    assert len(fake.asked) == 6


def test_what_was_answered_before_a_crash_is_not_asked_again(fake: Fake, tmp_path: Path) -> None:
    """The second process asks for what the first one did not finish, and for nothing twice."""
    fake.seconds = 0.05
    with connection(fake) as at:
        first = GenerationBatch(questions(8), 3, Journal(tmp_path), ORIGIN)
        first.begin(at)
        until(lambda: len(first.answers) >= 3)
    asked_before, finished = len(fake.asked), len(Journal(tmp_path).read(3))
    assert 3 <= finished < 8
    fake.seconds = 0.0
    with connection(fake) as at:
        again = GenerationBatch(questions(8), 3, Journal(tmp_path), ORIGIN)
        again.begin(at)
        assert again.complete(at)
    assert sorted(again.answers) == list(range(8))
    assert len(fake.asked) == asked_before + 8 - finished
    assert len(Journal(tmp_path).read(3)) == 8


def kept(version: int) -> Completion:
    return Completion(np.array([5]), np.zeros(1, np.float32), None, np.array([version]), "length")


def drawn(fake: Fake, folder: Path, asked: NamedRequest, origin: Origin) -> list[int]:
    """The ids of the answer to one question."""
    with connection(fake) as at:
        drawing = GenerationBatch([asked], 1, Journal(folder), origin)
        drawing.begin(at)
        assert drawing.complete(at)
    return drawing.answers[0].ids.tolist()


def test_an_answer_is_reused_only_for_what_was_asked(fake: Fake, tmp_path: Path) -> None:
    (before,) = questions(1)
    changes: list[dict[str, Any]] = [
        {"ids": [*before.ask.ids, 7]},
        {"max_tokens": before.ask.max_tokens + 1},
        {"sampling": before.ask.sampling.model_copy(update={"temperature": 0.5})},
        {"stop_ids": [3]},
        {"top_k": 4},
        {"seed": 2},
    ]
    for number, change in enumerate(changes):
        Journal(tmp_path / str(number)).add(1, before.name, Stored(ORIGIN.hash(before.ask), kept(0)))
        asked = replace(before, ask=replace(before.ask, **change))
        assert Journal(tmp_path / str(number)).read(1)[asked.name].answer.ids.tolist() == [5]
        assert not ORIGIN.has(Journal(tmp_path / str(number)).read(1)[asked.name], asked.ask), change
    assert drawn(fake, tmp_path / "0", before, ORIGIN) == [5]
    assert drawn(fake, tmp_path / "0", replace(before, ask=replace(before.ask, seed=2)), ORIGIN) == TOKENS
    assert len(fake.asked) == 1


def test_an_answer_is_reused_only_for_the_weights_it_came_from(fake: Fake, tmp_path: Path) -> None:
    """Without a checkpoint only the weights of step 0 are known to be the same."""
    (asked,) = questions(1)
    Journal(tmp_path / "start").add(1, asked.name, Stored(ORIGIN.hash(asked.ask), kept(0)))
    Journal(tmp_path / "trained").add(1, asked.name, Stored(ORIGIN.hash(asked.ask), kept(1)))
    anew = replace(ORIGIN, unchecked=True)
    assert drawn(fake, tmp_path / "start", asked, anew) == [5]
    assert drawn(fake, tmp_path / "trained", asked, ORIGIN) == [5]
    assert drawn(fake, tmp_path / "trained", asked, anew) == TOKENS
    assert drawn(fake, tmp_path / "start", asked, replace(ORIGIN, weights="another model")) == TOKENS


def test_other_weights_in_the_folder_are_another_start(tmp_path: Path) -> None:
    def setup() -> Any:
        model = SimpleNamespace(init="pretrained")
        config = SimpleNamespace(seed=0, models=SimpleNamespace(drawing=model))
        return SimpleNamespace(config=config, folder=tmp_path)

    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = start_of(setup())
    assert start_of(setup()) == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert start_of(setup()) != before


def test_what_was_answered_before_an_error_is_kept(fake: Fake, tmp_path: Path) -> None:
    fake.faults.extend([together(1), together(1), refused])
    with connection(fake) as at:
        drawing = GenerationBatch(questions(4), 1, Journal(tmp_path), ORIGIN)
        drawing.begin(at)
        with pytest.raises(Refused):
            drawing.complete(at)
    assert len(Journal(tmp_path).read(1)) == 2


def test_closing_ends_what_is_under_way() -> None:
    background = Background()
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append("cancelled")

    background.start(work())
    background.run(asyncio.sleep(0))
    background.close()
    assert ended == ["cancelled"]
