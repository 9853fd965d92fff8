"""Prefixes that rollouts of a group share, and the pieces that read each once."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_troll.batching.prefixes import Prefix, counted, shared_prefixes, tokens_read, tree_of
from megatron_troll.types import SHARES, Rollout
from tests.unit.batching.samples import rollout

# An episode that forks after its prompt, after a turn, and after what a tool answered to it.
TURNS = [1, 1, 0, 0, 1, 1]
EPISODES = [
    rollout([1, 2, 3], [4, 5, 6, 7, 8, 9], mask=TURNS),
    rollout([1, 2, 3], [4, 5, 6, 7, 9, 9], mask=TURNS),
    rollout([1, 2, 3], [4, 5, 6, 6, 8, 9], mask=TURNS),
    rollout([1, 2, 3], [5, 5]),
]


def lengths(rollouts: list[Rollout]) -> dict[int, int]:
    return {i: len(tokens_read(rollout)) for i, rollout in enumerate(rollouts)}


def test_a_group_shares_its_prompt() -> None:
    group = [rollout([1, 2], [3, 4]), rollout([1, 2], [3, 4]), rollout([1, 2], [5])]
    assert shared_prefixes(group) == [(Prefix(end=2, node=0, copies=3),)] * 3


def test_equal_prompts_of_two_groups_are_not_shared() -> None:
    assert shared_prefixes([rollout([1, 2], [3]), replace(rollout([1, 2], [3]), group=1)]) == [(), ()]


def test_an_empty_response_shares_nothing() -> None:
    """Its last prompt token predicts nothing, and is not read."""
    assert shared_prefixes([rollout([1, 2], []), rollout([1, 2], [3])]) == [(), ()]


def test_episodes_share_their_turns() -> None:
    ends = [[(prefix.end, prefix.copies) for prefix in found] for found in shared_prefixes(EPISODES)]
    assert ends == [[(3, 4), (5, 3), (7, 2)], [(3, 4), (5, 3), (7, 2)], [(3, 4), (5, 3)], [(3, 4)]]


def test_a_tree_of_three_levels() -> None:
    tree = tree_of(range(4), lengths(EPISODES), shared_prefixes(EPISODES))
    spelled = [tokens_read(EPISODES[p.rollout])[p.start : p.end].tolist() for p in tree.pieces]
    assert spelled == [[1, 2, 3], [5], [4, 5], [6, 6, 8], [6, 7], [8], [9]]
    assert [piece.parent for piece in tree.pieces] == [-1, 0, 0, 2, 2, 4, 4]
    assert [piece.readers for piece in tree.pieces] == [4, 1, 3, 1, 2, 1, 1]
    assert dict(zip(tree.rollouts, tree.paths)) == {3: (0, 1), 2: (0, 2, 3), 0: (0, 2, 4, 5), 1: (0, 2, 4, 6)}


def test_what_one_of_a_micro_batch_reads_is_one_piece() -> None:
    tree = tree_of([1, 3], lengths(EPISODES), shared_prefixes(EPISODES))
    assert [(piece.start, piece.end) for piece in tree.pieces] == [(0, 3), (3, 4), (3, 8)]


def test_without_prefixes_each_rollout_is_a_piece() -> None:
    tree = tree_of([2, 0], lengths(EPISODES), None)
    assert [(piece.rollout, piece.start, piece.end, piece.parent) for piece in tree.pieces] == [
        (2, 0, 8, -1),
        (0, 0, 8, -1),
    ]
    assert tree.paths == ((0,), (1,))


@st.composite
def groups(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts of few tokens, so that they fork anywhere."""
    token, found = st.integers(0, 1), []
    for group in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(token, min_size=1, max_size=3))
        for _ in range(draw(st.integers(1, 5))):
            response = draw(st.lists(token, max_size=5))
            mask = draw(st.lists(token, min_size=len(response), max_size=len(response)))
            found.append(replace(rollout(prompt, response, mask=mask), group=group))
    return found


@given(groups(), st.randoms(use_true_random=False))
def test_any_cut_reads_every_rollout_and_counts_every_token_alike(rollouts: list[Rollout], chance) -> None:
    prefixes, order = shared_prefixes(rollouts), list(range(len(rollouts)))
    chance.shuffle(order)
    at = chance.randint(0, len(order))
    whole = total([order], rollouts, shared=True)
    assert total([order[:at], order[at:]], rollouts, shared=True) == whole
    assert total([order], rollouts, shared=False) == whole
    tree = tree_of(order, lengths(rollouts), prefixes)
    for i, path in zip(tree.rollouts, tree.paths):
        pieces = [tree.pieces[number] for number in path]
        assert [piece.parent for piece in pieces] == [-1, *path[:-1]]
        read = [tokens_read(rollouts[piece.rollout])[piece.start : piece.end] for piece in pieces]
        assert np.array_equal(np.concatenate(read), tokens_read(rollouts[i]))


def total(cuts: list[list[int]], rollouts: list[Rollout], shared: bool) -> Counter[tuple[int, int, int]]:
    """What the tokens of a group at a position count for, over all micro-batches."""
    prefixes, sums = shared_prefixes(rollouts), Counter()
    for chosen in cuts:
        for piece in tree_of(chosen, lengths(rollouts), prefixes if shared else None).pieces:
            ids = tokens_read(rollouts[piece.rollout])
            for position, share in zip(
                range(piece.start, piece.end), counted(piece, prefixes[piece.rollout])
            ):
                sums[rollouts[piece.rollout].group, position, int(ids[position])] += int(share)
    return sums


def test_a_token_that_all_share_counts_once() -> None:
    group = [rollout([1, 2], [3, 4]), rollout([1, 2], [5, 4])]
    assert total([[0], [1]], group, shared=False)[0, 0, 1] == SHARES
