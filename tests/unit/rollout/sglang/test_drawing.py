"""A batch under way behind the main thread, and what a run that is continued finds of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.client import Client
from megatron_troll.rollout.sglang.generation import GenerationBatch
from megatron_troll.rollout.sglang.http import Http, Refused
from megatron_troll.rollout.sglang.journal import Journal
from megatron_troll.rollout.sglang.servers import ServerPool
from tests.sglang.asking import VERSIONS, checker
from tests.unit.rollout.sglang.asking import config, questions, until
from tests.unit.rollout.sglang.fake import TOKENS, Fake, fakes, refused, together


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
        drawing = GenerationBatch(questions(6), round=1, journal=None)
        drawing.begin(at)
        until(lambda: len(drawing.answers) == 6)
        assert drawing.complete(at)
    assert [drawing.answers[i].ids.tolist() for i in range(6)] == [TOKENS] * 6
    assert len(fake.asked) == 6


def test_what_was_answered_before_a_crash_is_not_asked_again(fake: Fake, tmp_path: Path) -> None:
    """The second process asks for what the first one did not finish, and for nothing twice."""
    fake.seconds = 0.05
    with connection(fake) as at:
        first = GenerationBatch(questions(8), 3, Journal(tmp_path))
        first.begin(at)
        until(lambda: len(first.answers) >= 3)
    asked_before, finished = len(fake.asked), len(Journal(tmp_path).read(3))
    assert 3 <= finished < 8
    fake.seconds = 0.0
    with connection(fake) as at:
        again = GenerationBatch(questions(8), 3, Journal(tmp_path))
        again.begin(at)
        assert again.complete(at)
    assert sorted(again.answers) == list(range(8))
    assert len(fake.asked) == asked_before + 8 - finished
    assert len(Journal(tmp_path).read(3)) == 8


def test_answers_with_another_top_k_are_asked_for_again(fake: Fake, tmp_path: Path) -> None:
    narrow = Completion(np.array([5]), np.zeros(1, np.float32), None, np.zeros(1, np.int64), "length")
    Journal(tmp_path).add(1, questions(1)[0].name, narrow)
    with connection(fake) as at:
        drawing = GenerationBatch(questions(1), 1, Journal(tmp_path))
        drawing.begin(at)
        assert drawing.complete(at)
    assert drawing.answers[0].ids.tolist() == TOKENS
    assert Journal(tmp_path).read(1)[questions(1)[0].name].ids.tolist() == TOKENS


def test_what_was_answered_before_an_error_is_kept(fake: Fake, tmp_path: Path) -> None:
    fake.faults.extend([together(1), together(1), refused])
    with connection(fake) as at:
        drawing = GenerationBatch(questions(4), 1, Journal(tmp_path))
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
