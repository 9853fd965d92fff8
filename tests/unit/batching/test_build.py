"""Micro-batches unpack to the rollouts they were made of, in every form."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.prefixes import shared_prefixes
from megatron_troll.types import (
    ENTRY_BYTES,
    LOSS_TOKEN_BYTES,
    SHARES,
    TOKEN_BYTES,
    MicroBatch,
    PackedTree,
    Rollout,
    TokenTopK,
)
from tests.unit.batching.samples import VOCAB, random_rollouts, rollout

ROLLOUTS = random_rollouts(6)
CHOSEN = [4, 0, 3]
FORMS = [
    Form(VOCAB, packed=packed, cp_size=cp, tp_size=tp)
    for packed in (True, False)
    for cp in (1, 2, 4)
    for tp in (1, 2, 3)
]


def build_ranks(rollouts: list[Rollout], chosen: list[int], form: Form) -> list[MicroBatch]:
    """The same micro-batch on every context-parallel rank. Rollout i has advantage i and weight i / 10."""
    advantages, weights = [float(i) for i in range(len(rollouts))], [i / 10 for i in range(len(rollouts))]
    return [
        build(rollouts, advantages, weights, chosen, dataclasses.replace(form, cp_rank=rank))
        for rank in range(form.cp_size)
    ]


def real_sequences(batches: list[MicroBatch], count: int) -> list[list[tuple[int, int]]]:
    """(position, token) of the tokens that are not padding, of all context-parallel ranks together."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for batch in batches:
        flat = zip(
            *(
                x.flatten().tolist()
                for x in (owners(batch, len(batches)), batch.positions, batch.tokens, batch.padding)
            )
        )
        for sequence, position, token, padding in flat:
            if not padding:
                found[sequence].append((position, token))
    return [sorted(tokens) for tokens in found]


def owners(batch: MicroBatch, cp_size: int) -> torch.Tensor:
    """[b, s] which sequence a place belongs to."""
    if batch.cu_seqlens is None:
        return torch.arange(len(batch.tokens))[:, None].expand_as(batch.tokens)
    lengths = batch.cu_seqlens.diff().long()
    return torch.arange(len(lengths)).repeat_interleave(lengths // cp_size)[None]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ranks_together_hold_every_token_once(form: Form) -> None:
    batches = build_ranks(ROLLOUTS, CHOSEN, form)
    for i, found in zip(CHOSEN, real_sequences(batches, len(CHOSEN))):
        whole = [*ROLLOUTS[i].prompt_ids.tolist(), *ROLLOUTS[i].response_ids.tolist()]
        assert found == list(enumerate(whole[:-1]))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_shapes_suit_sequence_and_context_parallelism(form: Form) -> None:
    for batch in build_ranks(ROLLOUTS, CHOSEN, form):
        assert len(batch.tokens) == (1 if form.packed else len(CHOSEN))
        assert batch.tokens.shape[1] % form.tp_size == 0
        assert batch.tokens.shape == batch.positions.shape == batch.padding.shape
        if form.packed:
            assert batch.cu_seqlens is not None
            assert batch.cu_seqlens.dtype == torch.int32
            lengths = batch.cu_seqlens.diff()
            assert (lengths % form.align == 0).all()
            assert batch.cu_seqlens[-1] == batch.tokens.shape[1] * form.cp_size
            assert batch.max_seqlen == lengths.max()
        else:
            assert batch.cu_seqlens is None
            assert batch.max_seqlen == batch.tokens.shape[1] * form.cp_size


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_tokens_are_those_of_the_masks(form: Form) -> None:
    """Each token with mask 1 is a target exactly once, predicted from the place just before it."""
    found = []
    for batch in build_ranks(ROLLOUTS, CHOSEN, form):
        for n in range(len(batch.target)):
            i = batch.rollouts[batch.sequence[n]]
            place = int(batch.positions.flatten()[batch.index[n]])
            t = place + 1 - len(ROLLOUTS[i].prompt_ids)
            assert batch.target[n] == ROLLOUTS[i].response_ids[t]
            assert batch.rollout_logp[n] == ROLLOUTS[i].logp[t]
            assert batch.position[n] == ROLLOUTS[i].mask[:t].sum()
            assert batch.advantage[n] == i
            assert batch.weight[n] == np.float32(i / 10)
            assert owners(batch, form.cp_size).flatten()[batch.index[n]] == batch.sequence[n]
            found.append((i, t))
    assert sorted(found) == sorted((i, t) for i in CHOSEN for t in np.flatnonzero(ROLLOUTS[i].mask).tolist())


def test_a_packed_batch_on_one_screen() -> None:
    """Two turns: the tool's tokens 7, 8 are read but carry no loss."""
    rollouts = [rollout([1, 2], [5, 6, 7, 8, 9], mask=[1, 1, 0, 0, 1]), rollout([3], [4])]
    batch = build(rollouts, [0.5, -1.0], [0.25, 0.125], [0, 1], Form(VOCAB, tp_size=4))
    assert batch.tokens.tolist() == [[1, 2, 5, 6, 7, 8, 3, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch.padding.tolist() == [[False] * 7 + [True]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 6, 8]
    assert batch.index.tolist() == [1, 2, 5, 6]
    assert batch.target.tolist() == [5, 6, 9, 4]
    assert batch.sequence.tolist() == [0, 0, 0, 1]
    assert batch.position.tolist() == [0, 1, 2, 0]
    assert batch.weight.tolist() == [0.25, 0.25, 0.25, 0.125]
    assert batch.advantage.tolist() == [0.5, 0.5, 0.5, -1.0]
    assert batch.rollouts == (0, 1)


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_prefixes_are_read_once_and_every_loss_token_is_predicted(cp: int, tp: int) -> None:
    """Each token is predicted from the place before it, in a sequence that its response is read in."""
    rollouts = [*ROLLOUTS, *(dataclasses.replace(ROLLOUTS[0], response_ids=ROLLOUTS[i].response_ids,
                marks=ROLLOUTS[i].marks, logp=ROLLOUTS[i].logp, sample=i)
                for i in (1, 2, 5))]  # fmt: skip
    chosen, found = [7, 4, 0, 8, 6], []
    form = Form(VOCAB, shared=True, cp_size=cp, tp_size=tp)
    prefixes = shared_prefixes(rollouts)
    advantages, weights = [float(i) for i in range(9)], [i / 10 for i in range(9)]
    for rank in range(cp):
        at = dataclasses.replace(form, cp_rank=rank)
        batch = build(rollouts, advantages, weights, chosen, at, prefixes)
        assert batch.tree is not None
        assert batch.tokens.shape == batch.share.shape
        assert batch.tokens.shape[1] % tp == 0
        assert set(batch.rollouts) == set(chosen)
        assert batch.max_seqlen > batch.positions.max()
        for n in range(len(batch.target)):
            i = batch.rollouts[batch.sequence[n]]
            place = int(batch.positions.flatten()[batch.index[n]])
            t = place + 1 - len(rollouts[i].prompt_ids)
            whole = np.concatenate([rollouts[i].prompt_ids, rollouts[i].response_ids])
            assert batch.tokens.flatten()[batch.index[n]] == whole[place]
            assert batch.target[n] == rollouts[i].response_ids[t]
            assert batch.advantage[n] == i
            assert batch.weight[n] == np.float32(i / 10)
            found.append((i, t))
    assert sorted(found) == sorted((i, t) for i in chosen for t in np.flatnonzero(rollouts[i].mask).tolist())


def test_a_shared_prompt_on_one_screen() -> None:
    rollouts = [rollout([1, 2], [5, 6]), rollout([1, 2], [7, 8, 9])]
    batch = build(
        rollouts, [1.0, -1.0], [1.0, 1.0], [0, 1], Form(VOCAB, shared=True), shared_prefixes(rollouts)
    )
    assert batch.tokens.tolist() == [[1, 2, 5, 7, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5]
    assert batch.tree == PackedTree(parent=(-1, 0, 0), start=(0, 2, 2), length=(2, 1, 2))
    assert batch.index.tolist() == [1, 2, 1, 3, 4]
    assert batch.target.tolist() == [5, 6, 7, 8, 9]
    assert batch.sequence.tolist() == [0, 0, 1, 1, 1]
    assert (batch.share == SHARES).all()


def test_zigzag_gives_each_rank_an_early_and_a_late_chunk() -> None:
    early, late = build_ranks([rollout([1], list(range(2, 10)))], [0], Form(VOCAB, cp_size=2))
    assert early.positions.tolist() == [[0, 1, 6, 7]]
    assert late.positions.tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_rollouts_there_is_padding_to_run_on(form: Form) -> None:
    for batch in build_ranks(ROLLOUTS, [], dataclasses.replace(form, topk=4)):
        assert batch.tokens.shape[0] == 1
        assert 0 < batch.tokens.shape[1] == batch.max_seqlen // form.cp_size
        assert batch.padding.all()
        assert batch.rollouts == ()
        for column in (
            batch.index,
            batch.target,
            batch.sequence,
            batch.position,
            batch.weight,
            batch.rollout_logp,
        ):
            assert column.shape == (0,)
        assert batch.index.dtype == batch.target.dtype == batch.sequence.dtype == torch.int64
        assert batch.rollout_topk is not None
        assert batch.rollout_topk.ids.shape == (0, 5)


def test_rollouts_without_loss_tokens_are_only_read() -> None:
    batch = build(
        [rollout([1, 2], []), rollout([3], [4, 5], mask=[0, 0])], [1, 1], [0, 0], [0, 1], Form(VOCAB)
    )
    assert batch.tokens.tolist() == [[1, 3, 4]]
    assert batch.target.tolist() == []
    assert batch.rollouts == (0, 1)


def test_log_probs_of_another_law_than_the_trainers_are_refused() -> None:
    warm = Form(VOCAB, temperature=0.7)
    with pytest.raises(ValueError, match=r"sample p#2: its log-probs are at temperature 1\.0, .* of 0\.7"):
        build([rollout([1], [2, 3], sample=2)], [1], [0], [0], warm)
    drawn_alike = dataclasses.replace(rollout([1], [2, 3]), temperature=0.7)
    assert build([drawn_alike], [1], [0], [0], warm).target.tolist() == [2, 3]


def test_bad_rollouts_are_named() -> None:
    broken = rollout([1], [2, 3], sample=7)
    broken.logp[1] = np.nan
    with pytest.raises(ValueError, match=r"sample p#7: engine log-prob of response token 1 is nan"):
        build([broken], [1.0], [1.0], [0], Form(VOCAB))
    with pytest.raises(ValueError, match="sample p#0: the prompt has no tokens"):
        build([rollout([], [2])], [1.0], [1.0], [0], Form(VOCAB))
    with pytest.raises(ValueError, match="sample p#0: arrays over the response differ in length"):
        build([rollout([1], [2, 3], mask=[1])], [1.0], [1.0], [0], Form(VOCAB))


def test_a_masked_token_may_have_no_log_prob() -> None:
    tool = rollout([1], [2, 3], mask=[1, 0])
    tool.logp[1] = np.nan
    assert build([tool], [1.0], [1.0], [0], Form(VOCAB)).rollout_logp.isfinite().all()


def test_the_bytes_of_a_token_are_those_that_a_plan_counts() -> None:
    """Measured on 4 and on 8 answer tokens, of which half carry loss."""

    def size(tokens: int) -> int:
        k = 3
        entries = np.arange(k * tokens).reshape(tokens, k)
        topk = TokenTopK(entries.astype(np.int32), -entries.astype(np.float32))
        one = rollout([1], list(range(2, 2 + tokens)), mask=[1, 0] * (tokens // 2), topk=topk)
        batch = build([one], [1.0], [1.0], [0], Form(VOCAB, topk=k))
        record = batch.rollout_topk
        assert record is not None
        per_token = [value for value in vars(batch).values() if isinstance(value, Tensor)]
        ofs = (batch.cu_seqlens, batch.response_advantage)
        own = [tensor for tensor in per_token if all(tensor is not of for of in ofs)]
        return sum(t.nbytes for t in (*own, record.ids, record.logits))

    grown = size(8) - size(4)
    assert grown == 4 * TOKEN_BYTES + 2 * LOSS_TOKEN_BYTES + 2 * 4 * ENTRY_BYTES  # k + 1 slots a token
