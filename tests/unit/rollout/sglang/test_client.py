"""Every question is answered once, whatever servers do meanwhile."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from megatron_troll.rollout.engine import EngineError
from megatron_troll.rollout.sglang.client import Client
from megatron_troll.rollout.sglang.http import (
    BadReply,
    Http,
    NoServers,
    Refused,
    ServerFault,
    Unreachable,
    WrongServer,
)
from megatron_troll.rollout.sglang.servers import ServerPool
from megatron_troll.types import TokenTopK
from tests.sglang.asking import VERSIONS, Asked, checker
from tests.sglang.model import VOCAB
from tests.sglang.recordings import LENGTH, PROMPT
from tests.unit.rollout.sglang.asking import config, generate
from tests.unit.rollout.sglang.fake import (
    TOKENS,
    Fake,
    Fault,
    aborted_after,
    changed,
    dropped,
    failed,
    fakes,
    garbage,
    refused,
    slow,
    together,
)


@pytest.fixture
def one() -> Iterator[Fake]:
    with fakes(1) as servers:
        yield servers[0]


@pytest.fixture
def two() -> Iterator[list[Fake]]:
    with fakes(2) as servers:
        yield servers


def assert_answered(asked: Asked, count: int) -> None:
    """Each question once, in full, with a record of every token."""
    assert asked.times == dict.fromkeys(range(count), 1)
    for answer in asked.answers.values():
        assert answer.ids.tolist() == TOKENS
        assert answer.finish == "length"
        assert answer.topk is not None
        assert answer.topk.ids[:, 0].tolist() == TOKENS
        np.testing.assert_allclose(answer.topk.logp[:, 0], answer.logp, atol=1e-5)
        assert answer.versions.tolist() == [1] * LENGTH


def test_questions_are_shared_out(two: list[Fake]) -> None:
    assert_answered(generate(two, 12), 12)
    assert {len(fake.asked) for fake in two} == {6}


def test_no_more_are_under_way_at_one_server_than_allowed(two: list[Fake]) -> None:
    for fake in two:
        fake.faults.extend([together(3)] * 3)
    assert_answered(generate(two, 20, concurrency=3), 20)
    assert [fake.most_under_way for fake in two] == [3, 3]


@pytest.mark.parametrize("fault", [dropped, failed, garbage], ids=lambda fault: fault.__name__)
def test_another_server_answers_what_one_failed_at(two: list[Fake], fault: Fault) -> None:
    two[0].faults.extend([fault] * 3)
    assert_answered(generate(two, 8), 8)


def score(fakes: list[Fake]) -> dict[str, list[TokenTopK]]:
    """The law of the recorded prompt, twice, from each server."""

    async def ask() -> dict[str, list[TokenTopK]]:
        http = Http(None)
        servers = ServerPool(config(), list, checker(http), None)
        client = Client(config(), http, servers, VERSIONS)
        try:
            return await client.score([fake.url for fake in fakes], [PROMPT, PROMPT], 8, VOCAB)
        finally:
            await http.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("fault", [dropped, failed, garbage], ids=lambda fault: fault.__name__)
def test_a_law_is_asked_for_again_then_left_out(two: list[Fake], fault: Fault) -> None:
    two[0].faults.append(fault)
    two[1].faults.extend([fault] * 6)
    laws = score(two)
    assert list(laws) == [two[0].url]
    assert [law.ids.shape for law in laws[two[0].url]] == [(len(PROMPT) - 1, 8)] * 2


def test_an_aborted_answer_is_kept_and_continued(one: Fake) -> None:
    one.faults.extend([aborted_after(5), aborted_after(3)])
    assert_answered(generate([one], 1), 1)
    asked = [(len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]) for body in one.asked]
    assert asked == [(6, 12), (11, 7), (14, 4)]


def test_one_that_is_aborted_after_its_last_token_is_whole(one: Fake) -> None:
    one.faults.append(aborted_after(LENGTH))
    assert_answered(generate([one], 1), 1)
    assert len(one.asked) == 1


def test_a_slow_server_hands_over_what_it_has_and_another_goes_on(two: list[Fake]) -> None:
    for fake in two:
        fake.faults.append(slow(4))
    assert_answered(generate(two, 2, deadline_s=0.2), 2)
    assert sorted(len(body["input_ids"]) for fake in two for body in fake.asked) == [6, 6, 10, 10]


def test_weights_that_change_meanwhile_are_told_apart(one: Fake) -> None:
    def updated(body: dict[str, Any], fake: Fake) -> Any:
        status, reply = aborted_after(5)(body, fake)  # pyright: ignore[reportGeneralTypeIssues]
        fake.version = VERSIONS.called(2)
        return status, reply

    async def want_the_new(client: Client, servers: ServerPool) -> None:
        while one.version != VERSIONS.called(2):
            await asyncio.sleep(0.01)
        await servers.want(VERSIONS.called(2))

    one.faults.append(updated)
    answer = generate([one], 1, want_the_new).answers[0]
    assert answer.ids.tolist() == TOKENS
    assert answer.versions.tolist() == [1] * 5 + [2] * 7


def test_a_server_that_lost_its_weights_is_not_believed(two: list[Fake]) -> None:
    """A restarted one answers with the weights of its folder."""

    def restarted(body: dict[str, Any], fake: Fake) -> Any:
        fake.version = "default"
        return aborted_after(LENGTH)(body, fake)

    two[0].faults.append(restarted)
    assert_answered(generate(two, 6), 6)


def make(change: Callable[[Any], object]) -> Fault:
    return changed(change)


def without_entries(reply: Any) -> None:
    reply["meta_info"]["output_top_logprobs_shape"] = [LENGTH, 4]
    for kind in ("val", "idx"):
        name = f"output_top_logprobs_{kind}_flat_b64"
        text = reply["meta_info"][name]
        reply["meta_info"][name] = text[: len(text) // 2]


def with_nan(reply: Any) -> None:
    reply["meta_info"]["output_token_logprobs"][0][0] = None


def of_another_run(reply: Any) -> None:
    reply["meta_info"]["weight_versions"][0]["version"] = "run.ffffffff.1"


LASTING = {
    "lost connections": (dropped, Unreachable, "sample p0#0, http://127"),
    "failures": (failed, ServerFault, "answered 500: CUDA error"),
    "no answers": (garbage, BadReply, "no list 'output_ids'"),
    "short records": (make(without_entries), BadReply, "4 top-K entries per position, asked for 8"),
    "NaN": (make(with_nan), BadReply, "restart it"),
    "aborts": (aborted_after(0), ServerFault, "aborted 3 times before a first token"),
    "another run's weights": (make(of_another_run), BadReply, "another run writes to it too"),
}


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_ends_the_batch_and_says_what_it_is(one: Fake, name: str) -> None:
    fault, kind, words = LASTING[name]
    one.faults.extend([fault] * 10)
    with pytest.raises(kind, match=words):
        generate([one], 1, patience_s=20.0)
    assert len(one.asked) == 3


def test_a_refused_question_is_not_asked_again(two: list[Fake]) -> None:
    two[0].faults.append(refused)
    two[1].faults.append(refused)
    with pytest.raises(Refused, match=r"sample p\d#0, .* is longer than the model's context length"):
        generate(two, 1)
    assert sum(len(fake.asked) for fake in two) == 1


def test_a_missing_key_ends_the_run_at_once(one: Fake) -> None:
    one.key = "secret"
    with pytest.raises(WrongServer, match=r"api_key_file") as caught:
        generate([one], 1)
    assert "secret" not in str(caught.value)


def test_without_servers_the_run_ends_after_a_while(one: Fake) -> None:
    one.overrides["/health"] = (503, {})
    with pytest.raises(NoServers, match=r"(?s)no usable server for 0.3 s.*answered 503.*mtroll serve"):
        generate([one], 1, patience_s=0.3)


def test_a_server_that_joins_is_asked_too(two: list[Fake]) -> None:
    known = [two[0].url]
    two[0].seconds = 0.1

    async def join(client: Client, servers: ServerPool) -> None:
        await asyncio.sleep(0.1)
        known.append(two[1].url)

    assert_answered(generate(two, 40, join, lambda: known, concurrency=1), 40)
    assert two[1].asked


def test_a_server_that_leaves_is_not_asked_again(two: list[Fake]) -> None:
    known: Sequence[str] = [fake.url for fake in two]
    two[0].seconds = two[1].seconds = 0.05
    counts: list[int] = []

    async def leave(client: Client, servers: ServerPool) -> None:
        nonlocal known
        known = [two[0].url]
        await servers.refresh()
        counts.append(len(two[1].asked))

    assert_answered(generate(two, 40, leave, lambda: known, concurrency=1), 40)
    assert len(two[1].asked) <= counts[0] + 1


def test_a_server_that_comes_back_is_asked_again(two: list[Fake]) -> None:
    """It is left alone for a while after a lost connection, then checked."""
    two[0].faults.append(dropped)
    for fake in two:
        fake.seconds = 0.05
    assert_answered(generate(two, 40, concurrency=1), 40)
    assert len(two[0].asked) > 1


def test_an_error_gives_up_what_is_under_way(two: list[Fake]) -> None:
    two[0].faults.extend([refused] * 20)
    two[1].seconds = 30.0
    began = time.monotonic()
    with pytest.raises(EngineError):
        generate(two, 4)
    assert time.monotonic() - began < 25.0
