"""Build one micro-batch of one rank from the rollouts chosen for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_troll.batching.experts import Routing, recorded
from megatron_troll.batching.plan import zigzag
from megatron_troll.batching.prefixes import Piece, Prefixes, PrefixTree, counted, tokens_read, tree_of
from megatron_troll.batching.uniforms import token_uniforms
from megatron_troll.parallel.groups import Groups
from megatron_troll.types import NO_ID, MicroBatch, PackedTree, Rollout, TopK

# For each rollout: one number, or one per response token [T].
Advantages = Sequence[float] | Sequence[np.ndarray]


@dataclass(frozen=True)
class Form:
    """The shape of micro-batches on one rank.

    vocab    number of tokens V, padded rows excluded
    packed   sequences one after the other in [1, s]; otherwise one per row, right padded, in [b, s]
    shared   prefixes that rollouts share are read once; needs `packed`
    topk     entries kept of the engine's record; 0: none
    temperature  the trainer divides its logits by this
    routing  the routers that replay the rollouts' experts; None: no replay
    """

    vocab: int
    packed: bool = True
    shared: bool = False
    cp_rank: int = 0
    cp_size: int = 1
    tp_size: int = 1
    topk: int = 0
    temperature: float = 1.0
    routing: Routing | None = None

    @classmethod
    def of(cls, groups: Groups, vocab: int, **fields: Any) -> Self:
        """The form on a rank of `groups`; `fields` are those that do not follow from the layout."""
        cp, tp = groups.cp, groups.tp
        return cls(vocab, cp_rank=cp.rank, cp_size=cp.size, tp_size=tp.size, **fields)

    @property
    def align(self) -> int:
        """Padded sequence lengths are multiples of this."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def total_align(self) -> int:
        """The padded total, over context-parallel ranks, is a multiple of this: each rank's part is then a
        multiple of the tensor-parallel size, as sequence parallelism needs."""
        return math.lcm(self.align, self.cp_size * self.tp_size)


class _Row(NamedTuple):
    """Columns [s] of one padded piece: tokens, positions in their rollout, whether they are padding, and
    what they count for (`prefixes.counted`)."""

    tokens: Tensor
    positions: Tensor
    padding: Tensor
    share: Tensor


class _Read(NamedTuple):
    """Places at which one rollout's loss tokens are predicted, [n] each: rows of the flat micro-batch, and
    indices of the tokens in the response."""

    rows: Tensor
    step: Tensor


def build(
    rollouts: Sequence[Rollout],
    advantages: Advantages,
    weights: Sequence[float],
    chosen: Sequence[int],
    form: Form,
    prefixes: Sequence[Prefixes] | None = None,
) -> MicroBatch:
    """Build the micro-batch of rollouts `chosen`, on the host. `weights`: one number per rollout. `prefixes`:
    `shared_prefixes` of the rollouts, by default none.

    The model reads prompt + response without its last token; the N positions are those that predict a
    response token whose mask is 1 and that lie on this context-parallel rank. With `form.shared` one position
    may predict several, and rollouts are in the order of their prefixes, not in that of `chosen`. If packed,
    the padding of the total is added to the last sequence. If `chosen` is empty, there is one sequence of
    padding, so that the forward still runs: N = 0, and `rollouts` is empty.

    `rollout_topk` is None if `form.topk` is 0 or a rollout has no engine record. Raises ValueError naming a
    sample that is malformed, lacks the experts to replay, or has a different temperature from the trainer's.
    """
    ids = {i: _checked(rollouts[i], form) for i in chosen}
    tree, lengths, rows = _laid_out(ids, prefixes or [()] * len(rollouts), form)
    picked = [rollouts[i] for i in tree.rollouts]
    whole = _Row(*(torch.cat(column) for column in zip(*rows)))
    reads = _reads(picked, tree, rows)
    steps = [read.step for read in reads]
    sequence = torch.arange(len(picked)).repeat_interleave(torch.tensor([len(s) for s in steps]).long())
    shape = (1 if form.packed else len(rows), -1)
    return MicroBatch(
        tokens=whole.tokens.view(shape),
        positions=whole.positions.view(shape),
        padding=whole.padding.view(shape),
        share=whole.share.view(shape),
        cu_seqlens=_starts(lengths) if form.packed else None,
        max_seqlen=max((piece.start for piece in tree.pieces), default=0) + max(lengths),
        tree=_packed_tree(tree),
        index=torch.cat([torch.empty(0, dtype=torch.int64), *(read.rows for read in reads)]),
        **_per_token(picked, steps),
        sequence=sequence,
        weight=torch.tensor([weights[i] for i in tree.rollouts], dtype=torch.float32)[sequence],
        advantage=_advantage(advantages, picked, tree.rollouts, steps),
        response_advantage=_response_advantage(advantages, tree.rollouts),
        rollout_topk=_topk(picked, steps, form),
        rollouts=tree.rollouts,
        groups=tuple(rollout.group for rollout in picked),
        batch_size=len(rollouts),
        apart=sum(map(len, ids.values())),
        experts=_experts(rollouts, tree.pieces, rows, form),
    )


def _per_token(picked: Sequence[Rollout], steps: Sequence[Tensor]) -> dict[str, Tensor]:
    """The columns [N] that are read from the rollouts, by their fields of a micro-batch."""
    return {
        "target": _read(picked, steps, lambda r: r.response_ids, torch.int64),
        "position": _read(picked, steps, lambda r: np.cumsum(r.mask > 0) - 1, torch.int64),
        "rollout_logp": _read(picked, steps, lambda r: r.logp, torch.float32),
        "uniform": _read(picked, steps, lambda r: token_uniforms(r.key, len(r.response_ids)), torch.float64),
    }


def _laid_out(
    ids: Mapping[int, np.ndarray], prefixes: Sequence[Prefixes], form: Form
) -> tuple[PrefixTree, list[int], list[_Row]]:
    """Lay out rollouts of tokens `ids`: their pieces, the padded lengths of these over all context-parallel
    ranks, and what this rank has of each; one of padding if there is none."""
    tree = tree_of(list(ids), {i: len(read) for i, read in ids.items()}, prefixes if form.shared else None)
    lengths = _padded_lengths([piece.end - piece.start for piece in tree.pieces] or [0], form)
    rows = [
        _local(ids[piece.rollout], piece, prefixes[piece.rollout], length, form)
        for piece, length in zip(tree.pieces, lengths)
    ]
    return tree, lengths, rows or [_padding(lengths[0], form)]


def _packed_tree(tree: PrefixTree) -> PackedTree | None:
    """Return the tree as a micro-batch holds it; None if no piece follows another."""
    if all(piece.parent == -1 for piece in tree.pieces):
        return None
    columns = zip(*((piece.parent, piece.start, piece.end - piece.start) for piece in tree.pieces))
    return PackedTree(*(tuple(column) for column in columns))


def _reads(picked: Sequence[Rollout], tree: PrefixTree, rows: Sequence[_Row]) -> list[_Read]:
    """Find where the loss tokens of each rollout are predicted, by position."""
    starts = np.cumsum([0, *(len(row.tokens) for row in rows)])
    reads = []
    for rollout, path in zip(picked, tree.paths):
        parts = [_read_in(rollout, rows[at], int(starts[at])) for at in path]
        reads.append(_Read(*(torch.cat(column) for column in zip(*parts))))
    return reads


def _read_in(rollout: Rollout, row: _Row, start: int) -> _Read:
    step = row.positions - (len(rollout.prompt_ids) - 1)
    carries_loss = torch.from_numpy(np.flatnonzero(rollout.mask > 0))
    at = (~row.padding & torch.isin(step, carries_loss)).nonzero()[:, 0]
    return _Read(start + at, step[at])


def _experts(
    rollouts: Sequence[Rollout], pieces: Sequence[Piece], rows: Sequence[_Row], form: Form
) -> dict[int, Tensor] | None:
    """`MicroBatch.experts`; zeros on padding. The rollouts of a shared prefix recorded the same."""
    routing = form.routing
    if routing is None:
        return None
    held = [
        np.zeros((len(row.tokens), routing.model_layers, routing.per_token), routing.dtype) for row in rows
    ]
    for piece, row, into in zip(pieces, rows, held):
        real = ~row.padding.numpy()
        into[real] = recorded(rollouts[piece.rollout], routing)[row.positions.numpy()[real]]
    # Routers receive the tokens in the order [s, b].
    whole = np.concatenate(held)[:, None] if form.packed else np.stack(held, axis=1)
    mine = np.split(whole, form.tp_size)[routing.tp_rank]
    shape = (-1, routing.per_token)
    return {layer: torch.from_numpy(mine[:, :, layer].reshape(shape)) for layer in routing.layers}


def _topk(picked: Sequence[Rollout], steps: Sequence[Tensor], form: Form) -> TopK | None:
    if form.topk == 0 or any(rollout.topk is None for rollout in picked):
        return None
    return engine_topk(picked, steps, form.topk, form.vocab)


def _advantage(
    advantages: Advantages, picked: Sequence[Rollout], chosen: Sequence[int], steps: Sequence[Tensor]
) -> Tensor:
    rows = [np.broadcast_to(advantages[i], rollout.response_ids.shape) for i, rollout in zip(chosen, picked)]
    parts = [torch.from_numpy(row[step.numpy()]).float() for row, step in zip(rows, steps)]
    return torch.cat([torch.empty(0), *parts])


def _response_advantage(advantages: Advantages, chosen: Sequence[int]) -> Tensor | None:
    if any(np.ndim(advantages[i]) for i in chosen):
        return None
    return torch.tensor([float(advantages[i]) for i in chosen], dtype=torch.float32)


def _checked(rollout: Rollout, form: Form) -> np.ndarray:
    """Return the tokens that the model reads. Raises the ValueErrors of `build`."""
    assert not (rollout.elsewhere and (form.topk or form.routing)), "share_records comes first"
    if len(rollout.prompt_ids) == 0:
        raise ValueError(
            f"sample {rollout.name}: the prompt has no tokens, so nothing predicts the first response token"
        )
    sizes = {
        "response_ids": len(rollout.response_ids),
        "marks": len(rollout.marks),
        "logp": len(rollout.logp),
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(f"sample {rollout.name}: arrays over the response differ in length: {sizes}")
    if rollout.temperature != form.temperature:
        raise ValueError(
            f"sample {rollout.name}: its log-probs are at temperature {rollout.temperature}, but the trainer "
            f"uses a temperature of {form.temperature}"
        )
    bad = np.flatnonzero((rollout.mask > 0) & ~np.isfinite(rollout.logp))
    if bad.size:
        raise ValueError(
            f"sample {rollout.name}: engine log-prob of response token {bad[0]} is {rollout.logp[bad[0]]}"
        )
    return tokens_read(rollout)


def _padded_lengths(lengths: Sequence[int], form: Form) -> list[int]:
    """Padded lengths over all context-parallel ranks; none is 0. If not packed, all are the same."""
    if not form.packed:
        return [_round_up(max(1, *lengths), form.total_align)] * len(lengths)
    padded = [_round_up(max(1, length), form.align) for length in lengths]
    total = sum(padded)
    padded[-1] += _round_up(total, form.total_align) - total
    return padded


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _local(ids: np.ndarray, piece: Piece, prefixes: Prefixes, length: int, form: Form) -> _Row:
    """The piece padded on the right to `length` and cut to this context-parallel rank."""
    real = piece.end - piece.start
    pad = (0, length - real)
    whole = _Row(
        tokens=F.pad(torch.from_numpy(ids[piece.start : piece.end]), pad),
        positions=piece.start + torch.arange(length),
        padding=torch.arange(length) >= real,
        share=F.pad(torch.from_numpy(counted(piece, prefixes)), pad),
    )
    mine = zigzag(length, form.cp_size, form.cp_rank)
    return _Row(*(column[mine] for column in whole))


def _padding(length: int, form: Form) -> _Row:
    """A piece without tokens."""
    return _local(np.empty(0, dtype=np.int64), Piece(0, 0, 0, -1, 0), (), length, form)


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _read(
    rollouts: Sequence[Rollout],
    steps: Sequence[Tensor],
    values: Callable[[Rollout], np.ndarray],
    dtype: torch.dtype,
) -> Tensor:
    """[N] entries of `values(rollout)` [T] for the response tokens on this rank."""
    parts = [torch.as_tensor(values(rollout), dtype=dtype)[step] for rollout, step in zip(rollouts, steps)]
    return torch.cat([torch.empty(0, dtype=dtype), *parts])


def engine_topk(rollouts: Sequence[Rollout], steps: Sequence[Tensor], k: int, vocab: int) -> TopK:
    """Log-probabilities of the sampling distribution as a TopK of W = k + 1 slots, lse = 0.

    `steps` holds, per rollout, the indices of the response tokens to read, N in all. At most the first k
    entries of each row are kept; the sampled token follows, with its own log-prob, if they lack it. Every
    rollout must have a record. Raises ValueError naming the sample if a kept entry is not finite.
    """
    ids = torch.full((sum(len(step) for step in steps), k + 1), NO_ID, dtype=torch.int64)
    logits = torch.full(ids.shape, -torch.inf, dtype=torch.float32)
    target, target_logp = ids.new_empty(len(ids)), logits.new_empty(len(ids))
    start = 0
    for rollout, step in zip(rollouts, steps):
        rows, tokens = slice(start, start + len(step)), step.numpy()
        row_ids, row_logp = _kept(rollout, tokens, k)
        ids[rows, : row_ids.shape[1]] = torch.from_numpy(row_ids).long()
        logits[rows, : row_ids.shape[1]] = torch.from_numpy(row_logp).float()
        target[rows] = torch.from_numpy(rollout.response_ids[tokens]).long()
        target_logp[rows] = torch.from_numpy(rollout.logp[tokens]).float()
        start += len(step)
    return _with_sampled(ids, logits, target, target_logp, vocab)


def _kept(rollout: Rollout, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    assert rollout.topk is not None
    ids, logp = rollout.topk.ids[tokens, :k], rollout.topk.logp[tokens, :k]
    bad = np.argwhere((ids != NO_ID) & ~np.isfinite(logp))
    if bad.size:
        row, slot = bad[0]
        raise ValueError(
            f"sample {rollout.name}: engine top-K of response token {tokens[row]} gives id {ids[row, slot]} "
            f"the log-prob {logp[row, slot]}"
        )
    return ids, logp


def _with_sampled(ids: Tensor, logits: Tensor, target: Tensor, target_logp: Tensor, vocab: int) -> TopK:
    """Append the sampled token to the rows that lack it. The last slot of `ids` [N, W] is free."""
    count = (ids != NO_ID).sum(1)
    found = ids == target[:, None]
    outside = ~found.any(1)
    place = torch.where(outside, count, found.int().argmax(1))
    ids[outside, count[outside]] = target[outside]
    logits[outside, count[outside]] = target_logp[outside]
    return TopK(
        ids, logits, count + outside, place, lse=torch.zeros(len(ids), dtype=torch.float64), vocab=vocab
    )
