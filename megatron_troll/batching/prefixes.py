"""Prefixes that several rollouts of a group share, and the pieces by which a micro-batch reads each once."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron_troll.types import SHARES, Rollout


@dataclass(frozen=True)
class Prefix:
    """The first `end` tokens of a rollout, with which `copies` > 1 rollouts of the batch begin. `node`: its
    number among the prefixes of the batch."""

    end: int
    node: int
    copies: int


Prefixes = tuple[Prefix, ...]


def shared_prefixes(rollouts: Sequence[Rollout], replay: bool = False) -> list[Prefixes]:
    """The prefixes that each rollout shares with others of its group, shortest first; with `replay` only
    where the experts that they recorded are the same, too.

    A prefix ends with the prompt or, in an episode of several turns, where its mask changes. A rollout
    without a response has none, because its last prompt token predicts nothing and is not read.
    """
    numbers: dict[tuple[tuple[str, int], bytes], int] = {}
    copies: Counter[int] = Counter()
    paths: list[list[tuple[int, int]]] = []
    for rollout in rollouts:
        ids, start, path = tokens_read(rollout), 0, []
        parent = ("group", rollout.group)
        for end in _ends(rollout):
            piece = hashlib.blake2b(ids[start:end], digest_size=16)
            if replay and rollout.experts is not None:
                # Records from disk may be wider than fresh ones.
                piece.update(rollout.experts[start:end].astype(np.uint16))
            node = numbers.setdefault((parent, piece.digest()), len(numbers))
            copies[node] += 1
            path.append((end, node))
            parent, start = ("node", node), end
        paths.append(path)
    return [
        tuple(Prefix(end, node, copies[node]) for end, node in path if copies[node] > 1) for path in paths
    ]


def tokens_read(rollout: Rollout) -> np.ndarray:
    """The tokens that the model reads, int64: prompt and response without the last token."""
    return np.concatenate([rollout.prompt_ids, rollout.response_ids])[:-1].astype(np.int64)


def _ends(rollout: Rollout) -> list[int]:
    prompt = len(rollout.prompt_ids)
    changes = np.flatnonzero(np.diff(rollout.mask > 0)) + 1
    return [prompt, *(prompt + changes).tolist()] if len(rollout.response_ids) else []


@dataclass(frozen=True)
class Piece:
    """Tokens start:end of `rollout`, read once for all `readers` rollouts of the micro-batch that begin with
    its first `end` tokens. They follow those of the piece `parent`; -1: none."""

    rollout: int
    start: int
    end: int
    parent: int
    readers: int


@dataclass(frozen=True)
class PrefixTree:
    """Pieces of a micro-batch, each before those that follow it, and those right after it; `paths`: the
    pieces of each rollout, in order. `rollouts`: the indices, in the order of their last pieces."""

    pieces: tuple[Piece, ...]
    rollouts: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


def tree_of(
    chosen: Sequence[int], lengths: Mapping[int, int], prefixes: Sequence[Prefixes] | None
) -> PrefixTree:
    """The pieces of rollouts `chosen`, of lengths[i] tokens read. Without `prefixes` each rollout is one."""
    if prefixes is None:
        alone = tuple(Piece(i, 0, lengths[i], -1, 1) for i in chosen)
        return PrefixTree(alone, tuple(chosen), tuple((at,) for at in range(len(chosen))))
    order = sorted(chosen, key=lambda i: ([prefix.node for prefix in prefixes[i]], i))
    pieces: list[Piece] = []
    paths: dict[int, tuple[int, ...]] = dict.fromkeys(order, ())

    def grow(members: Sequence[int], depth: int, start: int, path: tuple[int, ...]) -> None:
        """Add the pieces of `members`, which share their first `depth` prefixes, of `start` tokens."""

        def next_node(i: int) -> int:
            return prefixes[i][depth].node if depth < len(prefixes[i]) else -1

        for node, group in groupby(members, next_node):
            readers = list(group)
            if node == -1 or len(readers) == 1:
                for i in readers:
                    add(i, start, lengths[i], path, [i])
            else:
                below, end = _together([prefixes[i] for i in readers], depth)
                grow(readers, below, end, add(readers[0], start, end, path, readers))

    def add(i: int, start: int, end: int, path: tuple[int, ...], readers: Sequence[int]) -> tuple[int, ...]:
        if end > start or not path:
            pieces.append(Piece(i, start, end, path[-1] if path else -1, len(readers)))
            path = (*path, len(pieces) - 1)
        for reader in readers:
            paths[reader] = path
        return path

    grow(order, 0, 0, ())
    return PrefixTree(tuple(pieces), tuple(order), tuple(paths[i] for i in order))


def _together(prefixes: Sequence[Prefixes], depth: int) -> tuple[int, int]:
    """(number of prefixes, tokens) that rollouts share which share their first `depth` + 1 prefixes."""
    first, *others = prefixes
    while all(first[: depth + 2] == other[: depth + 2] for other in others) and len(first) > depth + 1:
        depth += 1
    return depth + 1, first[depth].end


def counted(piece: Piece, prefixes: Prefixes) -> np.ndarray:
    """[end - start] int32: what each token of a piece counts for, in units of token / SHARES. What `copies`
    rollouts of the batch share counts once over all micro-batches and ranks, exactly as much however a group
    is cut."""
    unit = np.full(piece.end, SHARES, dtype=np.int32)
    for prefix in reversed(prefixes):
        unit[: prefix.end] = round(SHARES / prefix.copies)
    return piece.readers * unit[piece.start :]
