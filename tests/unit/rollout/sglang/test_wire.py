"""The recorded answers of a real server as rollouts keep them, and every way in which one can be wrong."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_troll.config import Sampling
from megatron_troll.rollout.sglang.http import BadReply, ServerFault
from megatron_troll.rollout.sglang.topk import LOWEST, Size, topk_of
from megatron_troll.rollout.sglang.wire import SAMPLING_PARAMS, GenerationRequest, Span, part_of, score_of
from megatron_troll.types import NO_ID
from tests.sglang.model import VOCAB
from tests.sglang.recordings import GREEDY, LENGTH, NEVER, PROMPT, recorded

ASK = GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=8, vocab=VOCAB, seed=1)


def content(name: str = "generate") -> Any:
    return copy.deepcopy(recorded()[name]["content"])


def test_what_is_asked() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.9, min_p=0.02)
    body = GenerationRequest([1, 2], 5, sampling, (3, 4), top_k=64, vocab=VOCAB, seed=9).body("run-1-")
    assert body["input_ids"] == [1, 2]
    assert body["top_logprobs_num"] == 64
    assert body["sampling_params"] == {
        "max_new_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.02,
        "stop_token_ids": [3, 4],
        "sampling_seed": 9,
        "skip_special_tokens": False,
    }
    assert set(body["sampling_params"]) == set(SAMPLING_PARAMS)
    assert "top_logprobs_num" not in GenerationRequest([1], 5, sampling, (), 0, VOCAB, 1).body("")


def test_a_recorded_answer() -> None:
    part = part_of(content(), ASK)
    assert part.finish == "length"
    assert part.ids.tolist() == content()["output_ids"]
    assert part.spans == (Span("default", 0, LENGTH),)
    assert part.topk is not None
    assert part.topk.ids.shape == (LENGTH, 8)
    assert part.topk.ids.dtype == np.int32
    assert part.topk.logp.dtype == np.float32
    # Greedy: the sampled token leads its law, with the log-prob that it has there.
    assert part.topk.ids[:, 0].tolist() == part.ids.tolist()
    np.testing.assert_allclose(part.topk.logp[:, 0], part.logp, atol=1e-5)
    assert (np.diff(part.topk.logp) <= 0).all()


@pytest.mark.parametrize("name", ["generate_flat_json", "generate_nested_json"])
def test_json_holds_what_binary_holds(name: str) -> None:
    binary, other = part_of(content(), ASK), part_of(content(name), ASK)
    assert binary.topk is not None
    assert other.topk is not None
    assert np.array_equal(binary.topk.ids, other.topk.ids)
    np.testing.assert_allclose(binary.topk.logp, other.topk.logp, atol=1e-5)


def test_an_answer_that_stops() -> None:
    part = part_of(
        content("generate_stop"), GenerationRequest(PROMPT, 40, GREEDY, tuple(range(VOCAB)), 8, VOCAB, 1)
    )
    assert (part.finish, len(part.ids)) == ("stop", 1)


def test_without_a_record() -> None:
    ask = GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=0, vocab=VOCAB, seed=1)
    assert part_of(content("generate_without_topk"), ask).topk is None


def test_the_law_after_each_token_of_a_prompt() -> None:
    laws = score_of(content("score"), len(PROMPT), 8, VOCAB)
    assert laws.ids.shape == (len(PROMPT) - 1, 8)
    sampled = content("score")["meta_info"]["input_token_logprobs"][1:]
    for row, (logp, token, _) in enumerate(sampled):
        if token in laws.ids[row]:
            assert laws.logp[row, laws.ids[row] == token] == pytest.approx(logp, abs=1e-5)


def set_in(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(reply: Any) -> None:
        *above, last = path
        for key in above:
            reply = reply[key]
        reply[last] = to

    return change


META = "meta_info"
WRONG = {
    "no ids": (set_in("output_ids", to=None), BadReply, "no list 'output_ids'"),
    "ids are text": (set_in("output_ids", 3, to="a"), BadReply, "not token ids"),
    "another vocabulary": (set_in("output_ids", 0, to=VOCAB), BadReply, f"token {VOCAB} is outside"),
    "no meta": (set_in(META, to=[]), BadReply, "no dict 'meta_info'"),
    "unknown finish": (set_in(META, "finish_reason", to={"type": "tired"}), BadReply, "not one of stop"),
    "unknown stop": (set_in(META, "finish_reason", to={"type": "stop"}), BadReply, "not a stop token here"),
    "gave up": (
        set_in(META, "finish_reason", to={"type": "abort", "status_code": 500, "message": "no memory"}),
        ServerFault,
        "gave up: no memory",
    ),
    "other tokens": (set_in(META, "output_token_logprobs", 0, 1, to=1), BadReply, "not those of output_ids"),
    "no triples": (set_in(META, "output_token_logprobs", to=[1.0]), BadReply, "not triples"),
    "NaN": (set_in(META, "output_token_logprobs", 2, 0, to=None), BadReply, "response token 2 .* is None"),
    "impossible token": (set_in(META, "output_token_logprobs", 2, 0, to=LOWEST), BadReply, "token 2"),
    "text for a number": (set_in(META, "output_token_logprobs", 2, 0, to="x"), BadReply, "not numbers"),
    "shape": (set_in(META, "output_top_logprobs_shape", to=[LENGTH, 7]), BadReply, "in the shape"),
    "no shape": (set_in(META, "output_top_logprobs_shape", to=None), BadReply, "in the shape None"),
    "dtype": (set_in(META, "output_top_logprobs_idx_flat_b64_dtype", to="int64"), BadReply, "dtype int64"),
    "base64": (set_in(META, "output_top_logprobs_val_flat_b64", to="§"), BadReply, "cannot be decoded"),
    "spans with a gap": (set_in(META, "weight_versions", 0, "start", to=1), BadReply, "do not cover"),
    "no spans": (set_in(META, "weight_versions", to=[]), BadReply, "do not cover"),
    "spans without numbers": (set_in(META, "weight_versions", to=[{}]), BadReply, "not spans"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_told_from_a_right_one(name: str) -> None:
    change, kind, words = WRONG[name]
    reply = content()
    change(reply)
    with pytest.raises(kind, match=words):
        part_of(reply, ASK)


@pytest.mark.parametrize("reply", [None, "busy", [], {}])
def test_what_is_no_answer_at_all(reply: Any) -> None:
    with pytest.raises(BadReply, match="output_ids"):
        part_of(reply, ASK)


def test_fewer_entries_than_asked_for() -> None:
    more = GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=9, vocab=VOCAB, seed=1)
    for name in ("generate", "generate_flat_json", "generate_nested_json"):
        with pytest.raises(BadReply, match="8 top-K entries per position, asked for 9"):
            part_of(content(name), more)


def rows(*triples: tuple[float | None, int]) -> dict[str, Any]:
    return {"output_top_logprobs": [[[logp, token, None] for logp, token in triples]]}


def test_ties_are_put_in_order_of_ids() -> None:
    record = topk_of(rows((-1.0, 9), (-2.0, 7), (-2.0, 3), (-4.0, 1)), "output", Size(1, 4, VOCAB))
    assert record.ids.tolist() == [[9, 3, 7, 1]]
    assert record.logp.tolist() == [[-1.0, -2.0, -2.0, -4.0]]


def test_what_has_no_probability_is_left_out() -> None:
    record = topk_of(rows((-1e-9, 5), (LOWEST, 6), (LOWEST, 2)), "output", Size(1, 3, VOCAB))
    assert record.ids.tolist() == [[5, NO_ID, NO_ID]]
    assert record.logp[0, 1:].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize(
    ("entry", "kind"), [((None, 5), BadReply), ((-1.0, VOCAB), BadReply), ((-1.0, -3), BadReply)]
)
def test_an_entry_that_is_none(entry: tuple[float | None, int], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        topk_of(rows(entry), "output", Size(1, 1, VOCAB))
