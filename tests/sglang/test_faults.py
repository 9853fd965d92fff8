"""Every question is answered once, whatever real servers do meanwhile."""

import asyncio
import os
import random
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.config import SGLang
from megatron_troll.rollout.sglang import client
from megatron_troll.rollout.sglang.control import Control
from megatron_troll.rollout.sglang.http import Refused, WrongServer
from megatron_troll.rollout.sglang.servers import CatchUp
from tests.sglang.asking import VERSIONS, Asking, Parts
from tests.sglang.farm import Farm, RealServer
from tests.sglang.serving import (
    asking,
    assert_each_once,
    give,
    question,
    questions,
    routed,
    slow,
)
from tests.unit.rollout.sglang.fake import fakes, garbage

KILLS = 10
COUNT, LENGTH, CONCURRENCY = 32, 40, 4


@pytest.fixture
def same(two: list[RealServer], folder: Path) -> list[RealServer]:
    """Two servers with the same weights."""
    give(two, folder)
    return two


@pytest.fixture(scope="module")
def victim(farm: Farm, folder: Path) -> RealServer:
    """To be killed; start it again on the same port."""
    return farm.start(folder).wait_until_healthy()


def reborn(victim: RealServer, farm: Farm, folder: Path) -> RealServer:
    return farm.start(folder, port=int(victim.url.rsplit(":", 1)[1])).wait_until_healthy()


def killed(
    victim: RealServer, answers: int, interrupted: list[int]
) -> Callable[[Parts], Coroutine[Any, Any, None]]:
    """kill -9 once there are so many answers; adds how many questions were under way at the server."""

    async def kill(parts: Parts) -> None:
        while len(parts.asked.answers) < answers:
            await asyncio.sleep(0.001)
        interrupted.append(sum(s.under_way for s in parts.servers.usable if s.url == victim.url))
        victim.kill()

    return kill


def loading(folder: Path) -> Callable[[Control], CatchUp]:
    """As a sync by disk does for a server that comes later."""
    return lambda control: lambda url, version: control.load(url, str(folder), version)


def test_kill_9_at_ten_moments(farm: Farm, folder: Path, same: list[RealServer], victim: RealServer) -> None:
    """A server that comes back is given the weights and asked again, within the batch or in the next one."""
    steady, asked_for = same[0], questions(COUNT, LENGTH)
    calm = asking([steady], concurrency=CONCURRENCY).generate(asked_for)
    moments = random.Random(0).sample(range(COUNT - 2 * CONCURRENCY), KILLS)
    interrupted: list[int] = []
    for moment in moments:
        give([victim], folder)
        pair = asking([steady, victim], concurrency=CONCURRENCY)
        assert_each_once(pair.generate(asked_for, killed(victim, moment, interrupted)), calm)
        victim = reborn(victim, farm, folder)
    assert len(interrupted) == KILLS
    assert min(interrupted) > 0


def test_a_killed_server_comes_back_with_the_weights_within_the_batch(
    farm: Farm, folder: Path, same: list[RealServer], victim: RealServer
) -> None:
    """What a sync by disk left is loaded by whoever comes later."""
    asked_for = questions(COUNT, 2 * LENGTH)
    calm = asking(same[:1]).generate(asked_for)
    give([victim], folder)

    async def restart(parts: Parts) -> None:
        while not parts.asked.answers:
            await asyncio.sleep(0.001)
        victim.kill()
        await asyncio.to_thread(reborn, victim, farm, folder)

    alone = Asking(lambda: [victim.url], SGLang(concurrency=CONCURRENCY), catch_up=loading(folder))
    assert_each_once(alone.generate(asked_for, restart), calm)


def test_a_slow_server_hands_over_what_it_has(same: list[RealServer]) -> None:
    asked_for = [question(i, 24) for i in range(2)]
    calm = asking(same[:1]).generate(asked_for)
    with slow(same[0], 0.4):
        asked = asking(same, deadline_s=2.0).generate(asked_for)
    assert_each_once(asked, calm)
    continued = [(url, length) for url, length in asked.sent if length < 24]
    assert [url for url, _ in continued] == [same[1].url]
    assert 0 < continued[0][1] < 24


def test_a_server_that_hangs_is_left(same: list[RealServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ABORT_S", 0.5)
    asked_for = questions(8, 16)
    calm = asking(same[:1]).generate(asked_for)

    async def hang(parts: Parts) -> None:
        os.killpg(same[1].pid, signal.SIGSTOP)

    try:
        asked = asking(same, deadline_s=2.0).generate(asked_for, hang)
    finally:
        os.killpg(same[1].pid, signal.SIGCONT)
    assert_each_once(asked, calm)


def test_what_a_server_refuses_is_named_and_not_asked_again(same: list[RealServer]) -> None:
    too_long = question(7, 4, prompt=[5] * 300)
    with pytest.raises(Refused, match=r"sample p7#0, http://.* answered 400: .*301 tokens. is longer"):
        asking(same).generate([too_long])


def test_garbage_from_one_server_is_answered_by_the_other(same: list[RealServer]) -> None:
    asked_for = questions(12, 16)
    calm = asking(same[:1]).generate(asked_for)
    with fakes(1) as (broken,):
        broken.version = VERSIONS.called(1)
        broken.faults.extend([garbage] * 1000)
        urls = [same[0].url, broken.url]
        asked = Asking(lambda: urls, SGLang(concurrency=CONCURRENCY)).generate(asked_for)
        assert broken.asked
    assert_each_once(asked, calm)


def test_a_server_wants_its_key(farm: Farm, folder: Path) -> None:
    guarded = farm.start(folder, api_key="secret").wait_until_healthy()
    try:
        with pytest.raises(WrongServer, match="api_key_file") as caught:
            asking([guarded]).generate([question(0, 4)])
        assert "secret" not in str(caught.value)
        let_in = Asking(lambda: [guarded.url], SGLang(), catch_up=loading(folder), key="secret")
        assert let_in.generate([question(0, 4)]).times == {0: 1}
    finally:
        guarded.kill()


def test_a_router_with_two_servers_of_which_one_dies(
    farm: Farm, folder: Path, same: list[RealServer], victim: RealServer, tmp_path: Path
) -> None:
    asked_for = questions(COUNT, LENGTH)
    calm = asking(same[:1]).generate(asked_for)
    victim = reborn(victim, farm, folder)
    give([victim], folder)

    with routed(tmp_path / "router.log") as url:
        behind = asking([same[0], victim], router=url, concurrency=CONCURRENCY)
        asked = behind.generate(asked_for, killed(victim, COUNT // 3, []))
    assert_each_once(asked, calm)
    assert {to for to, _ in asked.sent} == {url}
