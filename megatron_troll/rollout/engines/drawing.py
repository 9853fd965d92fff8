"""Book-keeping of the in-process engine, from requests that wait to completions; no forward runs here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_troll.mcore.decode import Decoder
from megatron_troll.mcore.kv_cache import Prefix
from megatron_troll.parallel.groups import Group
from megatron_troll.rollout.engine import Completion, Request
from megatron_troll.types import TokenTopK

# Tokens of the prompts that one forward reads, if it reads more than one: its activations must fit.
PROMPT_TOKENS = 8192


@dataclass(frozen=True)
class Begun:
    """Requests that begin, by index; the prompts that must be read for them; and for each request the prompt
    behind which it starts, by index; -1: the last one that was read before."""

    prompts: list[np.ndarray] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)


class Waiting:
    """Requests that wait for a place, in order. A prompt is read once for the neighbours that have it: if
    only some of them find a place, its prefix is kept until the last of the others has one."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._prompts = [request.prompt_ids for request in requests]
        self._next = 0
        self._kept: Prefix | None = None

    def take(self, places: int) -> Begun:
        """The next requests, as many as there are places."""
        begun = Begun()
        while places > len(begun.requests) and self._next < len(self._prompts):
            ids = self._prompts[self._next]
            if not self._repeats(self._next):
                if begun.prompts and sum(map(len, begun.prompts)) + len(ids) > PROMPT_TOKENS:
                    break
                begun.prompts.append(ids)
            begun.sources.append(len(begun.prompts) - 1)
            begun.requests.append(self._next)
            self._next += 1
        return begun

    def behind(self, prefixes: Sequence[Prefix], begun: Begun) -> list[Prefix]:
        """The prefix behind which each request starts, from those of the prompts that were read."""
        found = [self._kept if source == -1 else prefixes[source] for source in begun.sources]
        if found:
            self._kept = found[-1] if self._repeats(self._next) else None
        return [prefix for prefix in found if prefix is not None]

    def _repeats(self, request: int) -> bool:
        """Whether a request has the prompt of the one before it."""
        if not 0 < request < len(self._prompts):
            return False
        return np.array_equal(self._prompts[request - 1], self._prompts[request])


@dataclass(frozen=True)
class Drawn:
    """One token of each of B requests, named by index: token [B] on every stage; logp [B] and top-K [B, K],
    ids int32, on the last stage."""

    requests: tuple[int, ...]
    token: Tensor
    logp: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logp: Tensor | None = None


class UnderWay:
    """The sequences under way, a row each as in the cache.

    requests  the request of each row, by index
    token     [B] the newest token of each row that had one, not read yet
    counts    tokens drawn for each request
    places    the numbers of each request's tokens among all that were read
    """

    def __init__(self, requests: int, device: torch.device) -> None:
        self.requests: list[int] = []
        self.token = torch.empty(0, dtype=torch.long, device=device)
        self.counts = [0] * requests
        self.places: list[list[int]] = [[] for _ in range(requests)]

    def extended(self, decoder: Decoder) -> None:
        """The decoder has read the newest tokens."""
        first = decoder.tokens_read - len(self.requests)
        for row, request in enumerate(self.requests):
            self.places[request].append(first + row)

    def add(self, request: int, prefix: Prefix) -> None:
        """Start a row behind a prefix."""
        self.requests.append(request)
        self.places[request] += range(prefix.first, prefix.first + prefix.length)

    def take(self, token: Tensor, stop_ids: Sequence[int], limit: int) -> list[int]:
        """Take a new token [B] for each row, and end the rows that stop with it or reach the limit: the last
        row takes the place of each. Returns their numbers in the order in which they end. Waits for the
        device."""
        ended = []
        for row, (request, drawn) in enumerate(zip(self.requests, token.tolist(), strict=True)):
            self.counts[request] += 1
            if drawn in stop_ids or self.counts[request] == limit:
                ended.append(row)
        order = list(range(len(token)))
        for row in reversed(ended):
            order[row] = order[-1]
            order.pop()
        self.requests = [self.requests[row] for row in order]
        self.token = token[order]
        return ended[::-1]


def experts_of(
    chosen: Mapping[int, list[Tensor]], places: Sequence[Sequence[int]], pp: Group
) -> list[np.ndarray]:
    """Experts [t, layers, k] of the tokens of each request, from `places`, their numbers among all that were
    read, and the experts of each forward ([n, k] by layer). Blocks on the pipeline."""
    if not places:
        return []
    mine = {f"{layer:06d}": torch.cat(of_forward).cpu().numpy() for layer, of_forward in chosen.items()}
    stages = [pp.broadcast_arrays(mine if stage == pp.rank else None, stage) for stage in range(pp.size)]
    every = {layer: experts for stage in stages for layer, experts in stage.items()}
    whole = np.stack([every[layer] for layer in sorted(every)], axis=1)
    return [whole[numbers] for numbers in places]


def completions(
    steps: Sequence[Drawn],
    counts: Sequence[int],
    stop_ids: Sequence[int],
    version: int,
    experts: Sequence[np.ndarray] | None = None,
) -> list[Completion]:
    """Completions of the requests, of which counts[i] tokens were drawn for the i-th, all from the weights
    `version`. `experts` [t, layers, k] of each request cover its prompt and all tokens but the last."""
    requests = np.concatenate([np.asarray(step.requests, dtype=np.int64) for step in steps] or [np.zeros(0)])
    order, ends = np.argsort(requests, kind="stable"), np.cumsum(counts)
    ids, logp, topk_ids, topk_logp = (
        _together([getattr(step, name) for step in steps], order)
        for name in ("token", "logp", "topk_ids", "topk_logp")
    )
    ids = None if ids is None else ids.astype(np.int32)
    answers = []
    for i, (count, end) in enumerate(zip(counts, ends.tolist(), strict=True)):
        mine = slice(end - count, end)
        assert ids is not None
        assert logp is not None
        topk = None
        if topk_ids is not None and topk_logp is not None:
            topk = TokenTopK(topk_ids[mine], topk_logp[mine])
        answers.append(
            Completion(
                ids=ids[mine],
                logp=logp[mine],
                topk=topk,
                versions=np.full(count, version, dtype=np.int32),
                finish="stop" if ids[mine][-1] in stop_ids else "length",
                experts=None if experts is None else experts[i],
            )
        )
    return answers


def _together(columns: Sequence[Tensor | None], order: np.ndarray) -> np.ndarray | None:
    """The rows of all columns, ordered, on the host; None if there are none. Waits for the device."""
    found = [column for column in columns if column is not None]
    return torch.cat(found).cpu().numpy()[order] if found else None
