"""Sources take turns by weight, each in its own order, and a run resumes at any prompt."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_troll.data.mixture import MixtureOrder, SourcePrompts, Turns, interleaved
from megatron_troll.data.order import PromptOrder
from megatron_troll.types import Message, Prompt


def prompts(name: str, count: int) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(f"{name}{i}", (Message("user", f"{name} {i}"),), "", source=name) for i in range(count)
    )


def order(seed: int = 0, **sizes_and_weights: tuple[int, float]) -> MixtureOrder:
    return MixtureOrder(
        [
            SourcePrompts(n, weight, (prompts(n, size),), ())
            for n, (size, weight) in sizes_and_weights.items()
        ],
        seed,
    )


def ids(drawn: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in drawn]


def test_two_thirds_of_the_turns_are_the_heavier_sources() -> None:
    assert Turns([2, 1]).next(0, 9) == [0, 1, 0] * 3
    assert Turns([1, 1, 1]).next(0, 4) == [0, 1, 2, 0]
    assert Turns([0.2, 0.1]).next(3, 6) == [0, 1, 0] * 2


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6),
    begin=st.integers(0, 100),
)
def test_the_turns_so_far_follow_from_their_number_alone(weights: list[float], begin: int) -> None:
    turns = Turns(weights)
    whole = turns.next(0, 140)
    assert turns.next(begin, 40) == whole[begin : begin + 40]
    had = [whole[:begin].count(member) for member in range(len(weights))]
    assert turns.counts(begin) == had
    # Webster's method may leave the quota, by less than the number of members.
    shares = [begin * weight / sum(weights) for weight in weights]
    assert all(abs(got - share) < len(weights) for got, share in zip(had, shares))


def test_a_batch_holds_the_shares_and_every_prompt_comes_once_an_epoch() -> None:
    mixed = order(a=(6, 2.0), b=(3, 1.0))
    first = mixed.next(9, {})
    assert Counter(prompt.source for prompt in first) == {"a": 6, "b": 3}
    assert len(set(ids(first))) == 9
    assert sorted(ids(mixed.next(9, {}))) == sorted(ids(first))


def test_any_position_is_a_place_to_continue_from() -> None:
    whole = ids(order(seed=3, a=(5, 1.0), b=(7, 2.5), c=(2, 0.3)).next(40, {}))
    for position in (0, 1, 13, 39):
        resumed = order(seed=3, a=(5, 1.0), b=(7, 2.5), c=(2, 0.3))
        resumed.seek(position)
        assert ids(resumed.next(40 - position, {})) == whole[position:]
    assert ids(order(seed=4, a=(5, 1.0), b=(7, 2.5), c=(2, 0.3)).next(40, {})) != whole
    with pytest.raises(ValueError, match="a position is a number of prompts"):
        order(a=(1, 1.0)).seek(-1)


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    drawn = order(a=(50, 1.0), b=(50, 1.0)).next(100, {})
    of = {name: [int(p.id[1:]) for p in drawn if p.source == name] for name in ("a", "b")}
    assert of["a"] != of["b"]


def test_a_run_without_named_sources_keeps_its_order() -> None:
    """Runs of earlier releases continue."""
    only = MixtureOrder([SourcePrompts("", 1.0, (prompts("", 6),), ())], seed=7)
    expected = PromptOrder(6, seed=7)
    assert ids(only.next(4, {}) + only.next(5, {})) == [str(i) for i in expected.next(9)]


def test_every_beginning_of_the_held_out_prompts_holds_the_shares() -> None:
    mixed = interleaved({"a": prompts("a", 4), "b": prompts("b", 2), "c": ()})
    assert ids(list(mixed)) == ["a0", "b0", "a1", "a2", "b1", "a3"]
    assert interleaved({"a": ()}) == ()
