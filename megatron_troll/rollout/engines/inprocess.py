"""The engine that generates with the training model itself, in the trainer's processes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from troll_kernels.topk import largest

from megatron_troll.batching.uniforms import uniforms
from megatron_troll.config import Sampling
from megatron_troll.mcore.decode import Decoder, generation_mode
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.router import recording
from megatron_troll.rollout.engine import Completion, Engine, Request, Setup, rollout_of
from megatron_troll.rollout.engines.drawing import Begun, Drawn, UnderWay, Waiting, completions, experts_of
from megatron_troll.rollout.records import on_rank_0
from megatron_troll.rollout.sampling import sample, sample_key
from megatron_troll.types import Rollout

# What a rank reads that has nothing to read.
NOTHING = np.zeros(1, dtype=np.int64)


class InProcessEngine(Engine):
    """Samples with a KV cache on the training weights under TP, EP, PP and DP: each data-parallel rank
    generates its share of the requests, up to `max_sequences` at a time, then all ranks gather the answers. A
    prompt is read once for all its samples, and the place of one that ended is taken by the next. The same
    requests, `sampling` and `round` give the same tokens on any layout: a token's uniform is keyed by (seed,
    round, prompt id, sample, position)."""

    returns_experts = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = setup.rollout
        self.model = setup.model
        self.seed = setup.config.seed
        self._version = 0
        self._records = setup.config.train.replay == "rollout"

    def sync(self, version: int) -> dict[str, float]:
        self._version = version
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        """See Engine. Each rank holds every rollout's ids and log-probs in host memory, rank 0 their top-K
        and experts too."""
        dp = self.model.groups.dp
        # Neighbours, which share prompts, stay together.
        mine = range(len(requests) * dp.rank // dp.size, len(requests) * (dp.rank + 1) // dp.size)
        with generation_mode(self.model):
            answers = self._draw([requests[i] for i in mine], sampling, round)
        recorded = bool(self.config.top_k) or self._records
        every = on_rank_0(answers, self.model.groups, recorded)
        elsewhere = recorded and self.model.groups.world.rank > 0
        return [
            rollout_of(self.setup, request, answer, sampling, round, elsewhere=elsewhere)
            for request, answer in zip(requests, every, strict=True)
        ]

    def _draw(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Completion]:
        """Draw all answers; returns them on the last pipeline stage, [] elsewhere. A rank whose requests are
        done still forwards a token while others are not, because experts may be sharded over data-parallel
        ranks."""
        keys = [sample_key(self.seed, round, request.prompt.id, request.sample) for request in requests]
        longest = max((len(request.prompt_ids) for request in requests), default=1)
        most = self.config.max_sequences
        decoder = Decoder(self.model, most, longest + sampling.max_tokens, self.config.kv_cache)
        waiting, rows, steps = Waiting(requests), UnderWay(len(requests), device()), list[Drawn]()
        with recording(self.model.chunks if self._records else []) as chosen:
            while True:
                begun = waiting.take(most - len(rows.requests))
                if not self._any_rank(bool(rows.requests or begun.requests)):
                    break
                hidden = self._read(decoder, waiting, rows, begun)
                steps.append(self._sample(hidden, rows, keys, sampling))
                for row in rows.take(steps[-1].token, self.setup.stop_ids, sampling.max_tokens):
                    decoder.cache.remove(row)
        experts = experts_of(chosen, rows.places, self.model.groups.pp) if self._records else None
        if not self.model.groups.is_last_stage:
            return []
        return completions(steps, rows.counts, self.setup.stop_ids, self._version, experts)

    def _read(self, decoder: Decoder, waiting: Waiting, rows: UnderWay, begun: Begun) -> Tensor | None:
        """Read the newest token of every row and the prompts of those that begin, which become rows. Returns
        the hidden states [B, h] of all rows on the last stage."""
        nothing = [] if begun.prompts or rows.requests else [NOTHING]
        prefixes, hidden = decoder.extend(begun.prompts or nothing, rows.token)
        rows.extended(decoder)
        behind = waiting.behind(prefixes, begun)
        for request, prefix in zip(begun.requests, behind, strict=True):
            decoder.cache.add(prefix)
            rows.add(request, prefix)
        if hidden is None:
            return None
        return torch.cat([hidden, *(prefix.hidden[None] for prefix in behind if prefix.hidden is not None)])

    def _any_rank(self, value: bool) -> bool:
        """Whether `value` is true on any rank. Blocks on all ranks."""
        flag = torch.tensor(float(value), device=device())
        return self.model.groups.world.any(flag)

    def _sample(
        self, hidden: Tensor | None, rows: UnderWay, keys: Sequence[int], sampling: Sampling
    ) -> Drawn:
        """Sample a token for each row on the last stage, from whole rows [B, V] of logits, gathered over the
        tensor-parallel ranks, and broadcast the tokens to the other stages."""
        pp, tp, size = self.model.groups.pp, self.model.groups.tp, self.model.shape.vocab
        requests = tuple(rows.requests)
        if hidden is None or not requests:
            empty = torch.empty(len(requests), dtype=torch.long, device=device())
            return Drawn(requests, pp.broadcast(empty, pp.size - 1))
        logits = torch.cat(tp.all_gather(Head(self.model).logits(hidden)), -1)[:, :size]
        logprobs = torch.log_softmax(logits / sampling.logprob_temperature, -1)
        uniform = uniforms([keys[i] for i in requests], [rows.counts[i] for i in requests])
        token = sample(logprobs, torch.from_numpy(uniform).to(logprobs.device), sampling)
        pp.broadcast(token, pp.size - 1)
        logp = logprobs.gather(1, token[:, None])[:, 0]
        if not self.config.top_k:
            return Drawn(requests, token, logp)
        values, ids = largest(logprobs, min(self.config.top_k, size))
        return Drawn(requests, token, logp, ids.int(), values)
