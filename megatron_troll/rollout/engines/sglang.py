"""The engine that generates on SGLang servers over HTTP."""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_troll.config import RunPaths, Sampling
from megatron_troll.rollout.engine import Engine, Request, Setup, rollout_of
from megatron_troll.rollout.records import packed, unpacked
from megatron_troll.rollout.sampling import sample_key
from megatron_troll.rollout.sglang import probe as diagnosis
from megatron_troll.rollout.sglang import weights
from megatron_troll.rollout.sglang.client import NamedRequest
from megatron_troll.rollout.sglang.connection import Connection, open_connection
from megatron_troll.rollout.sglang.control import Pause
from megatron_troll.rollout.sglang.generation import GenerationBatch, Origin, start_of
from megatron_troll.rollout.sglang.http import WrongServer
from megatron_troll.rollout.sglang.journal import Journal
from megatron_troll.rollout.sglang.probe import TOP_K, Gap, gaps, sequences
from megatron_troll.rollout.sglang.weights import RankZero
from megatron_troll.rollout.sglang.wire import GenerationRequest, Routed
from megatron_troll.types import Rollout


class SGLangEngine(Engine):
    """Rank 0 sends the requests and broadcasts the answers to all ranks: there is only one view of which
    servers exist, and each request is answered once. All ranks hold every rollout of a batch, rank 0 the
    top-K and experts too."""

    generates_elsewhere = True
    returns_experts = True

    def __init__(self, setup: Setup) -> None:
        """Waits until a server is healthy and serves the model."""
        super().__init__(setup)
        self._version: int | None = None
        self._first_version: int | None = None
        self._resting = False
        keep = setup.rollout.sglang.buffer
        self._journal = Journal(RunPaths.of(setup.config).buffer) if keep else None
        probe = setup.rollout.sglang.probe
        self._probed = sequences([prompt.ids for prompt in setup.prompts], probe.tokens)[: probe.prompts]
        self.connection: Connection | None = None
        self._rank_zero = RankZero(setup.model, None)
        self._open()
        self._weights = self._rank_zero.first(lambda connection: start_of(setup))

    def _open(self) -> None:
        def connect() -> None:
            self.connection = open_connection(self.setup)

        self.setup.model.groups.world.first(connect)
        self._rank_zero = RankZero(self.setup.model, self.connection)

    def sync(self, version: int) -> dict[str, float]:
        """See weights.sync; then runs the probe. Raises WrongServer if a server is too far from it."""
        if version == self._version and not self._resting:
            return {}
        if self._resting:
            self._rank_zero.first(lambda connection: connection.on_all(connection.control.occupy))
            self._resting = False
        reached = weights.sync(self._rank_zero, version, self._pause)
        self._version = version
        if self._first_version is None:
            self._first_version = version
        return {"servers": float(len(reached)), **self._probe(reached)}

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        """See Engine. The servers choose the random numbers, unless they are deterministic. If all servers
        are replaced meanwhile, the new ones get the weights and continue."""
        return self._started(requests, sampling, round, None)()

    def start(
        self, requests: Sequence[Request], sampling: Sampling, round: int
    ) -> Callable[[], list[Rollout]]:
        """See Engine; answers are buffered as they arrive, and buffered ones are not requested again."""
        return self._started(requests, sampling, round, self._journal)

    def _started(
        self, requests: Sequence[Request], sampling: Sampling, round: int, journal: Journal | None
    ) -> Callable[[], list[Rollout]]:
        questions = [self._question(request, sampling, round) for request in requests]
        drawing = GenerationBatch(questions, round, journal, Origin(self._weights, self._first_version == 0))
        self._rank_zero.first(drawing.begin)

        def finish() -> list[Rollout]:
            while not self._rank_zero.first(drawing.complete):
                assert self._version is not None
                weights.sync(self._rank_zero, self._version, self._pause)
            world = self.setup.model.groups.world
            drawn = [drawing.answers[i] for i in range(len(questions))] if world.rank == 0 else None
            arrays = world.broadcast_arrays(None if drawn is None else packed(drawn), 0)
            answers = unpacked(arrays) if drawn is None else drawn
            elsewhere = world.rank > 0 and (self.setup.rollout.top_k > 0 or self._replays)
            return [
                rollout_of(self.setup, request, answer, sampling, round, elsewhere=elsewhere)
                for request, answer in zip(requests, answers, strict=True)
            ]

        return finish

    def forget(self, round: int) -> None:
        if self._journal is not None:
            journal = self._journal
            self._rank_zero.first(lambda connection: journal.forget(round))

    def rest(self) -> None:
        """Make colocated servers release the memory of weights and caches until the next sync."""
        if self.setup.rollout.sglang.colocated:
            self._rank_zero.first(lambda connection: connection.on_all(connection.control.release))
            self._resting = True

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        if self._journal is not None:
            self._journal.close()

    @property
    def _pause(self) -> Pause:
        """Treatment of the requests in flight by a sync. After a retraction the record of experts is that of
        a second reading; an aborted answer keeps that of its first part."""
        return "abort" if self._replays else "retract"

    @property
    def _replays(self) -> bool:
        return self.setup.config.train.replay == "rollout"

    def _question(self, request: Request, sampling: Sampling, round: int) -> NamedRequest:
        shape = self.setup.model.shape
        vocab, routed = shape.vocab, None
        if self._replays:
            routed = Routed(shape.layers, shape.experts_per_token, shape.experts)
        ask = GenerationRequest(
            ids=request.prompt_ids.tolist(),
            max_tokens=sampling.max_tokens,
            sampling=sampling,
            stop_ids=self.setup.stop_ids,
            # A server crashes if asked for more entries than its vocabulary has.
            top_k=min(self.setup.rollout.top_k, vocab),
            vocab=vocab,
            # SGLang takes seeds of 63 bits.
            seed=sample_key(self.setup.config.seed, round, request.prompt.id, request.sample) >> 1,
            routed=routed,
        )
        return NamedRequest(f"{request.prompt.id}#{request.sample}", ask)

    def _probe(self, urls: Sequence[str]) -> dict[str, float]:
        if not self._probed:
            return {}
        vocab = self.setup.model.shape.vocab
        ids = [one.ids.tolist() for one in self._probed]
        served = self._rank_zero.first(
            lambda connection: connection.background.run(
                connection.client.score(urls, ids, min(TOP_K, vocab), vocab)
            )
        )
        found = gaps(self.setup.model, self._probed, served)
        self._judge(found)
        return {
            "engine_kl": max(gap.mean for gap in found.values()),
            "engine_kl/p99": max(gap.p99 for gap in found.values()),
        }

    def _judge(self, found: dict[str, Gap]) -> None:
        url, worst = max(found.items(), key=lambda item: np.nan_to_num(item[1].mean, nan=np.inf))
        limit = self.setup.rollout.sglang.probe.max_kl
        if not worst.mean <= limit:
            raise WrongServer(
                f"{url} is {worst.mean:.2g} nats from the trainer, 99 % of tokens within {worst.p99:.2g} "
                f"(rollout.sglang.probe.max_kl={limit:g}). {self._diagnosis(url)}"
            )

    def _diagnosis(self, url: str) -> str:
        return diagnosis.told(self._rank_zero, url, self.setup)
