"""What servers are told: replies are read, refusals are errors that say what to do."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from megatron_troll.rollout.sglang.control import Control, each
from megatron_troll.rollout.sglang.http import BadReply, Http, Unreachable, UpdateRefused, WrongServer
from tests.unit.rollout.sglang.fake import RECORDED, Fake, fakes


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fakes(1) as servers:
        yield servers[0]


def told(act: Callable[[Control], Awaitable[object]]) -> object:
    async def run() -> object:
        http = Http(None)
        try:
            return await act(Control(http, timeout_s=30.0))
        finally:
            await http.close()

    return asyncio.run(run())


def test_weights_go_between_the_opening_and_closing_of_an_update(fake: Fake) -> None:
    with pytest.raises(UpdateRefused, match=r"(?s)must run between begin_weight_update.*Restart it"):
        told(lambda control: control.take_tensors(fake.url, "aGk=", ranks=1))

    async def in_session(control: Control) -> None:
        await control.open_update(fake.url)
        await control.take_tensors(fake.url, "aGk=", ranks=2)
        await control.close_update(fake.url)

    told(in_session)
    assert not fake.session


def test_an_update_that_was_broken_off_is_closed_first(fake: Fake) -> None:
    fake.session = True
    told(lambda control: control.open_update(fake.url))
    assert fake.session
    assert fake.log == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


def test_a_refusal_within_an_answer_of_200_is_one(fake: Fake) -> None:
    fake.overrides["/update_weights_from_disk"] = (
        200,
        {"success": False, "message": "size mismatch for gate"},
    )
    with pytest.raises(UpdateRefused, match="size mismatch for gate; restart the server"):
        told(lambda control: control.load(fake.url, "/weights", "v"))


def test_the_version_is_verified(fake: Fake) -> None:
    told(lambda control: control.name_weights(fake.url, "run.3"))
    assert fake.log == ["/flush_cache", "/update_weight_version"]
    told(lambda control: control.verify(fake.url, "run.3"))
    with pytest.raises(WrongServer, match=r"given weights 'run\.4' and reports 'run\.3'"):
        told(lambda control: control.verify(fake.url, "run.4"))


def test_what_a_server_says_of_itself(fake: Fake) -> None:
    assert told(lambda control: control.ranks(fake.url)) == 1
    sums = told(lambda control: control.checksums(fake.url))
    assert sums == RECORDED["checksums"]["content"]["ranks"][0]["checksums"]
    fake.overrides["/server_info"] = (200, {"model": "other"})
    with pytest.raises(BadReply, match="returned no tp_size"):
        told(lambda control: control.ranks(fake.url))


def test_what_fails_in_passing_is_returned_and_what_does_not_is_raised(fake: Fake) -> None:
    away = "http://127.0.0.1:9"
    failed = told(lambda control: each([fake.url, away], lambda url: control.pause(url, "retract")))
    assert isinstance(failed, dict)
    assert list(failed) == [away]
    assert isinstance(failed[away], Unreachable)
    fake.overrides["/begin_weight_update"] = (400, {"success": False, "message": "no"})
    with pytest.raises(UpdateRefused, match="answered 400: no"):
        told(lambda control: each([away, fake.url], control.open_update))
