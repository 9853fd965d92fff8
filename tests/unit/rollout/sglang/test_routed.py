"""Routed experts in a reply as rollouts keep them; each way in which they can be wrong."""

import base64
import copy
from typing import Any

import numpy as np
import pytest

from megatron_troll.batching.experts import unrecorded
from megatron_troll.rollout.engine import EngineError
from megatron_troll.rollout.sglang.http import BadReply, WrongServer
from megatron_troll.rollout.sglang.wire import GenerationRequest, Routed, continued, experts_of, part_of
from tests.sglang.model import VOCAB
from tests.sglang.recordings import GREEDY, LENGTH, NEVER, PROMPT, recorded

ROUTED = Routed(layers=2, per_token=3, experts=300)


def sent(experts: Any) -> dict[str, str]:
    return {"routed_experts": base64.b64encode(np.array(experts, "<i4").tobytes()).decode()}


def test_a_record_is_sorted_and_small() -> None:
    drawn = np.random.default_rng(0).permuted(np.tile(np.arange(300), (5 * 2, 1)), axis=1)[:, :3]
    found = experts_of(sent(drawn), 5, ROUTED)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, np.sort(drawn.reshape(5, 2, 3), -1))
    assert experts_of(sent(np.zeros((5, 2, 3))), 5, Routed(2, 3, 255)).dtype == np.uint8


@pytest.mark.parametrize(
    ("meta", "error", "said"),
    [
        ({}, WrongServer, "--enable-return-routed-experts (serve.routed_experts=true)"),
        ({"routed_experts": "?"}, BadReply, "cannot be decoded"),
        (sent(np.zeros((4, 2, 3))), BadReply, "24 routed experts; .* = (5, 2, 3)"),
        (sent(np.full((5, 2, 3), 300)), BadReply, "from 300 to 300; the policy has 300"),
        (sent(np.full((5, 2, 3), -1)), BadReply, "from -1 to -1"),
    ],
)
def test_what_is_no_record_says_what_to_do(meta: dict[str, str], error: type[EngineError], said: str) -> None:
    with pytest.raises(error) as caught:
        experts_of(meta, 5, ROUTED)
    assert all(part in str(caught.value) for part in said.split(".*"))


def test_an_answer_in_parts_has_one_record() -> None:
    """The second part reads the prompt and the first part again, by newer weights."""
    first, second = np.full((4, 2, 3), 1), np.full((7, 2, 3), 2)
    whole = continued([first, second])
    assert whole is not None
    assert whole[:, 0, 0].tolist() == [1] * 4 + [2] * 3
    assert continued([]) is None


def test_an_answer_carries_them() -> None:
    reply = copy.deepcopy(recorded()["generate"]["content"])
    ask = GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=8, vocab=VOCAB, seed=1, routed=ROUTED)
    assert ask.body("")["return_routed_experts"]
    with pytest.raises(WrongServer, match="routed_experts=true"):
        part_of(reply, ask)
    read = len(PROMPT) + LENGTH - 1
    reply["meta_info"] |= sent(np.tile(np.arange(3), (read, 2, 1)))
    experts = part_of(reply, ask).experts
    assert experts is not None
    assert experts.shape == (read, 2, 3)


def answered(routed: Routed, **meta: Any) -> np.ndarray:
    """Whether the routing [P + T - 1] of each token is known in an answer with `meta`."""
    reply = copy.deepcopy(recorded()["generate"]["content"])
    reply["meta_info"] |= sent(np.tile(np.arange(3), (len(PROMPT) + LENGTH - 1, 2, 1))) | meta
    ask = GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=8, vocab=VOCAB, seed=1, routed=routed)
    experts = part_of(reply, ask).experts
    assert experts is not None
    return (experts != unrecorded(routed.experts)).all((1, 2))


def test_a_retracted_answer_has_no_record_of_its_sampling() -> None:
    assert answered(ROUTED).all()
    assert not answered(ROUTED, num_retractions=1).any()
