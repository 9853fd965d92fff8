"""In-process generation: cached decoding is the full forward, and every layout draws the same tokens."""

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.config import Sampling
from megatron_troll.mcore.decode import Decoder
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.kv_cache import Prefix, round_to_fp8
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.types import HeadRequest, Rollout
from tests.dist.generation_worker import (
    CONFIG,
    STOPS,
    TOKENIZER,
    Case,
    Generated,
    generate,
    generate_cases,
    opened,
    packed,
    requests,
    state,
)
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS, Sizes, expected_groups
from tests.dist.parameters import main_gradient, parameters_by_name
from tests.dist.tiny import write_reference

WITHOUT_CP = [name for name, (_, sizes) in LAYOUTS.items() if "cp" not in sizes]
PLAIN = Sampling(max_tokens=8)
FILTERED = Sampling(max_tokens=8, temperature=0.7, top_p=0.9, top_k=20, min_p=0.02)
BACKWARDS = tuple(range(9, -1, -1))
CASES = {
    "plain": Case(PLAIN),
    "filtered": Case(FILTERED),
    "greedy": Case(Sampling(max_tokens=8, temperature=0.0)),
    "backwards, three at a time": Case(PLAIN, {"max_sequences": 3}, BACKWARDS),
    "fewer than ranks": Case(PLAIN, order=(3,)),
    "none": Case(PLAIN, order=()),
    "fp8": Case(PLAIN, {"kv_cache": "fp8_e4m3"}),
    "fp8, backwards, three at a time": Case(PLAIN, {"kv_cache": "fp8_e4m3", "max_sequences": 3}, BACKWARDS),
}
EXACT = [name for name in CASES if "fp8" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_reference(CONFIG, folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(ranks1: RankPool, folder: str) -> Generated:
    return ranks1.run(generate_cases, {}, folder, CASES)[0]


@pytest.fixture(scope="module", params=WITHOUT_CP)
def generated(request: pytest.FixtureRequest, folder: str) -> list[Generated]:
    """Every rank's, on one layout whose group sizes are as asked."""
    world, sizes = LAYOUTS[request.param]
    pool = request.getfixturevalue(f"ranks{world}")
    results: list[Generated] = pool.run(generate_cases, sizes, folder, CASES)
    assert len(results) == world
    for result in results:
        assert result.groups == expected_groups(world, sizes)
        assert result.chunks == sizes.get("vpp", 1)
    return results


@pytest.mark.parametrize("case", EXACT)
def test_cached_decoding_equals_a_full_forward(generated: list[Generated], case: str) -> None:
    seen = set()
    for result in generated:
        by_name = {rollout.name: rollout for rollout in result.rollouts[case]}
        for name, reading in result.readings[case].items():
            seen.add(name)
            rollout = by_name[name]
            assert rollout.topk is not None
            np.testing.assert_allclose(rollout.logp, reading.logp, rtol=0, atol=1e-5)
            np.testing.assert_allclose(rollout.topk.logp, reading.topk_logp, rtol=0, atol=1e-5)
            assert np.array_equal(rollout.topk.ids, reading.topk_ids)
    assert seen == {rollout.name for rollout in generated[0].rollouts[case]}


@pytest.mark.parametrize("case", EXACT)
def test_every_layout_draws_the_same_tokens(generated: list[Generated], alone: Generated, case: str) -> None:
    """On every rank, in the order of the requests."""
    for result in generated:
        assert len(result.rollouts[case]) == len(CASES[case].order)
        for rollout, expected in zip(result.rollouts[case], alone.rollouts[case]):
            assert_same(rollout, expected)


def assert_same(rollout: Rollout, expected: Rollout) -> None:
    assert (rollout.name, rollout.group, rollout.finish) == (expected.name, expected.group, expected.finish)
    assert rollout.response_ids.tolist() == expected.response_ids.tolist()
    assert rollout.text == expected.text
    np.testing.assert_allclose(rollout.logp, expected.logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["backwards, three at a time", "fewer than ranks"])
def test_neither_batch_nor_order_changes_what_is_drawn(alone: Generated, case: str) -> None:
    expected = {rollout.name: rollout for rollout in alone.rollouts["plain"]}
    assert [r.name for r in alone.rollouts[case]] == [requests_name(i) for i in CASES[case].order]
    for rollout in alone.rollouts[case]:
        assert_same(rollout, expected[rollout.name])


def requests_name(place: int) -> str:
    request = requests()[place]
    return f"{request.prompt.id}#{request.sample}"


def test_answers_end_at_a_stop_token_or_at_the_limit(alone: Generated) -> None:
    rollouts = [rollout for name in EXACT for rollout in alone.rollouts[name]]
    assert {rollout.finish for rollout in rollouts} == {"stop", "length"}
    assert {len(rollout.response_ids) for rollout in rollouts} > {1, 8}
    stops = set(STOPS)
    for rollout in rollouts:
        ids = rollout.response_ids.tolist()
        stopped = rollout.finish == "stop"
        assert stopped or len(ids) == 8
        assert (ids[-1] in stops) == stopped
        assert not stops & set(ids[:-1])
        assert len(rollout.logp) == len(rollout.mask) == len(ids)
        assert rollout.mask.all()


def test_the_text_has_neither_the_stop_token_nor_special_tokens(alone: Generated) -> None:
    stopped_by_text = 0
    for rollout in alone.rollouts["plain"]:
        tokens = TOKENIZER.convert_ids_to_tokens(rollout.response_ids.tolist())
        if rollout.finish == "stop":
            stopped_by_text += len(tokens.pop()) == 1
        assert rollout.text == "".join(token for token in tokens if len(token) == 1)
    assert stopped_by_text


def test_temperature_divides_and_filters_cut_but_only_temperature_shows_in_logp(alone: Generated) -> None:
    """The readings that the log-probs equal are of the full law; top-k 20 of 53 and top-p 0.9 cut it."""
    for rollout in alone.rollouts["filtered"]:
        assert rollout.topk is not None
        assert (rollout.logp >= np.log(0.02) + rollout.topk.logp[:, 0] - 1e-5).all()
        covered = np.exp(rollout.topk.logp.astype(np.float64)).sum(1)
        outside = rollout.logp < rollout.topk.logp[:, -1]
        assert (covered[outside] < 0.9).all()


def test_greedy_takes_the_first_of_the_top_k(alone: Generated) -> None:
    for rollout in alone.rollouts["greedy"]:
        assert rollout.topk is not None
        assert rollout.response_ids.tolist() == rollout.topk.ids[:, 0].tolist()
    samples = alone.rollouts["greedy"]
    assert samples[0].response_ids.tolist() == samples[1].response_ids.tolist()


def test_samples_rounds_and_seeds_draw_apart(ranks1: RankPool, folder: str) -> None:
    cases = {
        "plain": Case(PLAIN),
        "round": Case(PLAIN, round=2),
        "seed": Case(PLAIN, seed=4),
        "again": Case(PLAIN),
    }
    rollouts = ranks1.run(generate_cases, {}, folder, cases)[0].rollouts
    plain, again = tokens_of(rollouts["plain"]), tokens_of(rollouts["again"])
    assert plain == again
    assert len(set(plain)) == len(plain)
    assert not set(plain) & set(tokens_of(rollouts["round"]))
    assert not set(plain) & set(tokens_of(rollouts["seed"]))
    assert {version for rollout in rollouts["round"] for version in rollout.versions.tolist()} == {3}


def tokens_of(rollouts: list[Rollout]) -> list[tuple[str, ...]]:
    return [(rollout.prompt.id, *map(str, rollout.response_ids)) for rollout in rollouts]


@pytest.mark.parametrize("layout", ["one-rank", "tp2-ep2", "pp2-interleaved"])
def test_generation_leaves_training_as_it_was(
    layout: str, folder: str, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    for differing in request.getfixturevalue(f"ranks{world}").run(train_and_generate, sizes, folder):
        assert differing == []


def train_and_generate(sizes: Sizes, folder: str) -> list[str]:
    """What a generation, and then one that raises, changes of this rank's state or gradients."""
    case, differing = CASES["fp8"], []
    with opened(sizes, folder) as model:
        next(model.chunks[0].modules()).training = False
        before = state(model)
        rollouts = generate(model, case)
        gradients = gradients_of(model, rollouts)
        for what, run in (("generated", generate), ("raised", raise_in_generation)):
            run(model, case)
            differing += [f"{name} when {what}" for name, now in state(model).items() if now != before[name]]
            kept = all(torch.equal(now, gradients[name]) for name, now in current_gradients(model).items())
            again = gradients_of(model, rollouts)
            same = all(torch.equal(again[name], gradients[name]) for name in gradients)
            differing += [] if kept and same else [f"gradients when {what}"]
    return differing


def gradients_of(model: MegatronModel, rollouts: list[Rollout]) -> dict[str, Tensor]:
    """Of the summed log-probability of the rollouts, over every rank."""
    batches = packed(rollouts, model.groups)
    head = Head(model)

    def loss(i: int, hidden: Tensor) -> tuple[Tensor, None]:
        logp = head.read(hidden, batches[i].target, HeadRequest(logp=True)).logp
        assert logp is not None
        return -logp.sum(), None

    accumulate(model, batches, loss)
    gradients = current_gradients(model)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    return gradients


def current_gradients(model: MegatronModel) -> dict[str, Tensor]:
    return {name: main_gradient(p).clone() for name, p in parameters_by_name(model).items()}


def raise_in_generation(model: MegatronModel, case: Case) -> None:
    """On every rank, at the third step."""
    extend, calls = Decoder.extend, []

    def failing(
        decoder: Decoder, prompts: Sequence[np.ndarray], tokens: Tensor
    ) -> tuple[list[Prefix], Tensor | None]:
        calls.append(tokens)
        if len(calls) == 3:
            raise FloatingPointError("on purpose")
        return extend(decoder, prompts, tokens)

    with patch.object(Decoder, "extend", failing), pytest.raises(FloatingPointError, match="on purpose"):
        generate(model, case)


def test_context_parallelism_is_refused_before_any_forward(ranks2: RankPool, folder: str) -> None:
    for message in ranks2.run(refused, {"cp": 2}, folder):
        assert "context parallelism (cp=2)" in message
        assert "models.policy.layout.cp=1" in message


def refused(sizes: Sizes, folder: str) -> str:
    with opened(sizes, folder) as model, patch.object(type(model.chunks[0]), "forward") as forward:
        with pytest.raises(ValueError, match="in-process engine") as caught:
            generate(model, CASES["plain"])
        assert not forward.called
        return str(caught.value)


@pytest.mark.parametrize("case", [name for name in CASES if name not in EXACT])
def test_an_fp8_cache_shifts_log_probs_and_draws_alike_on_every_layout(
    generated: list[Generated], alone: Generated, case: str
) -> None:
    """Keys and values that differ in the last bit may round apart, so log-probs are equal to 1e-2 only, and a
    draw may differ where its uniform lies that close to a border; with this seed none does."""
    expected = {rollout.name: rollout for rollout in alone.rollouts["fp8"]}
    for result in generated:
        by_name = {rollout.name: rollout for rollout in result.rollouts[case]}
        for name, rollout in by_name.items():
            assert rollout.response_ids.tolist() == expected[name].response_ids.tolist()
            np.testing.assert_allclose(rollout.logp, expected[name].logp, rtol=0, atol=1e-2)
        for name, reading in result.readings[case].items():
            shift = np.abs(by_name[name].logp - reading.logp)
            assert shift.max() > 1e-3
            assert shift.max() < 0.5


def test_an_fp8_cache_is_deterministic(ranks2: RankPool, folder: str) -> None:
    cases = {"first": CASES["fp8"], "second": CASES["fp8"]}
    rollouts = ranks2.run(generate_cases, {"tp": 2, "ep": 2}, folder, cases)[0].rollouts
    for first, second in zip(rollouts["first"], rollouts["second"]):
        assert np.array_equal(first.response_ids, second.response_ids)
        assert np.array_equal(first.logp, second.logp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rounding_saturates_and_is_idempotent(dtype: torch.dtype) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype) * 50
    values = torch.cat([values, torch.tensor([0.0, 1e-9, 1e9, -1e9, 448.0, 449.0], dtype=dtype)])
    rounded = round_to_fp8(values)
    assert rounded.dtype == dtype
    assert torch.equal(round_to_fp8(rounded), rounded)
    assert rounded[-6:].tolist() == [0.0, 0.0, 448.0, -448.0, 448.0, 448.0]
    normal = values.abs().clamp(max=448.0) >= 2**-6
    error = (rounded - values.clamp(-448.0, 448.0)).abs()
    assert (error[normal] <= values.abs()[normal] / 16).all()
    assert error.max() > 0


@pytest.mark.parametrize("layout", ["one-rank", "tp2-ep2"])
def test_bf16_log_probs_are_those_of_a_full_forward_to_its_precision(
    layout: str, folder: str, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    pool = request.getfixturevalue(f"ranks{world}")
    for result in pool.run(generate_cases, sizes, folder, {"plain": CASES["plain"]}, "bf16"):
        for rollout in result.rollouts["plain"]:
            reading = result.readings["plain"][rollout.name]
            np.testing.assert_allclose(rollout.logp, reading.logp, rtol=0, atol=0.1)
