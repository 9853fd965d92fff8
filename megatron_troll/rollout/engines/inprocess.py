"""The engine that generates with the training model itself, in the trainer's processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from troll_kernels.topk import largest

from megatron_troll.config import Sampling
from megatron_troll.mcore.decode import Decoder, generation_mode
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.router import over_stages, recording
from megatron_troll.rollout.engine import Completion, Engine, Request, Setup, rollout_of
from megatron_troll.rollout.sampling import sample, sample_key, uniforms
from megatron_troll.types import Rollout, TokenTopK


class InProcessEngine(Engine):
    """Samples with KV caches on the training weights under TP, EP, PP and DP: each data-parallel rank
    generates its share of the requests, `max_sequences` at a time, then all ranks gather everything. The same
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
        """See Engine. Each rank holds every rollout's ids, log-probs and top-K in host memory."""
        dp = self.model.groups.dp
        mine = requests[dp.rank :: dp.size]
        rounds = -(-len(requests[:: dp.size]) // self.config.max_sequences)
        answers: list[Completion] = []
        with generation_mode(self.model, self.config.kv_cache):
            for i in range(rounds):
                batch = mine[i * self.config.max_sequences : (i + 1) * self.config.max_sequences]
                answers += self._decode(batch, sampling, round)
        answers = self.model.groups.pp.broadcast_object(answers, self.model.groups.pp.size - 1)
        shares = dp.all_gather_objects(answers)
        return [
            rollout_of(self.setup, request, shares[i % dp.size][i // dp.size], sampling, round)
            for i, request in enumerate(requests)
        ]

    def _decode(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Completion]:
        """Decode one static batch to its end; returns the answers on the last pipeline stage, [] elsewhere. A
        rank without requests still decodes one padding row, because experts may be sharded over data-parallel
        ranks."""
        keys = [sample_key(self.seed, round, r.prompt.id, r.sample) for r in requests] or [0]
        stops = torch.tensor(self.setup.stop_ids, device=device())
        tokens, padding = left_pad([r.prompt_ids for r in requests] or [np.zeros(1, dtype=np.int64)])
        decoder = Decoder(self.model, padding, tokens.shape[1] + sampling.max_tokens)
        done = torch.full((len(keys),), not requests, device=tokens.device)
        steps: list[DecodeStep] = []
        with recording(self.model.chunks if self._records else []) as chosen:
            for position in range(sampling.max_tokens):
                step = self._step(decoder.extend(tokens), keys, position, sampling)
                steps.append(step)
                tokens = step.token[:, None]
                done |= torch.isin(step.token, stops)
                if not self._any_rank(not bool(done.all())):
                    break
        experts = self._experts(chosen, padding)
        if not self.model.groups.is_last_stage:
            return []
        return answers_of(steps, self.setup.stop_ids, self._version, experts)[: len(requests)]

    def _experts(self, chosen: Mapping[int, list[Tensor]], padding: Tensor) -> list[np.ndarray] | None:
        """Experts [t, layers, k] of all tokens that the model read, for each of the B rows, from the experts
        of each forward ([s * B, k], position by position); None if not recorded. Blocks on the pipeline."""
        if not self._records:
            return None
        rows = len(padding)
        mine = {
            layer: torch.cat(of_forward).view(-1, rows, of_forward[0].shape[-1]).cpu().numpy()
            for layer, of_forward in chosen.items()
        }
        layers = over_stages(mine, self.model.groups.pp)
        whole = np.stack(list(layers.values()), axis=2)
        return [whole[unread:, row] for row, unread in enumerate(padding.sum(1).tolist())]

    def _any_rank(self, value: bool) -> bool:
        """Whether `value` is true on any rank. Blocks on all ranks."""
        flag = torch.tensor(float(value), device=device())
        return self.model.groups.world.any(flag)

    def _step(
        self, hidden: Tensor | None, keys: list[int], position: int, sampling: Sampling
    ) -> "DecodeStep":
        """Sample on the last stage from full rows [B, V], gathered over the tensor-parallel ranks, and
        broadcast the tokens to the other stages."""
        pp, tp, size = self.model.groups.pp, self.model.groups.tp, self.model.shape.vocab
        if hidden is None:
            empty = torch.empty(len(keys), dtype=torch.long, device=device())
            return DecodeStep(pp.broadcast(empty, pp.size - 1), None, None, None)
        logits = torch.cat(tp.all_gather(Head(self.model).logits(hidden)), -1)[:, :size]
        logprobs = torch.log_softmax(logits / sampling.logprob_temperature, -1)
        uniform = torch.from_numpy(uniforms(keys, position)).to(logprobs.device)
        token = sample(logprobs, uniform, sampling)
        pp.broadcast(token, pp.size - 1)
        logp = logprobs.gather(1, token[:, None])[:, 0]
        if not self.config.top_k:
            return DecodeStep(token, logp, None, None)
        values, ids = largest(logprobs, min(self.config.top_k, size))
        return DecodeStep(token, logp, ids, values)


@dataclass(frozen=True)
class DecodeStep:
    """One decode step of B rows: token [B] on every stage; logp [B] and top-K [B, K] on the last stage."""

    token: Tensor
    logp: Tensor | None
    topk_ids: Tensor | None
    topk_logp: Tensor | None


def left_pad(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Tokens [B, P] int64, left-padded with 0, and padding [B, P] bool, True on padded positions."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    padding = torch.ones(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        padding[row, longest - len(prompt) :] = False
    return tokens.to(device()), padding.to(device())


def answers_of(
    steps: Sequence[DecodeStep],
    stop_ids: Sequence[int],
    version: int,
    experts: Sequence[np.ndarray] | None = None,
) -> list[Completion]:
    """Completions of the rows of `steps`, each cut after its first stop token, all sampled from the weights
    `version`. `experts` [t, layers, k] of each row cover its prompt and all steps but the last."""
    unread = len(steps) - 1
    ids, logp = _stack([step.token for step in steps]), _stack([step.logp for step in steps])
    topk = None
    if steps[0].topk_ids is not None:
        topk_ids = _stack([step.topk_ids for step in steps]).astype(np.int32)
        topk = topk_ids, _stack([step.topk_logp for step in steps])
    stops = np.isin(ids, stop_ids)
    ended = np.any(stops, axis=1)
    lengths = np.where(ended, stops.argmax(axis=1) + 1, ids.shape[1])
    return [
        Completion(
            ids=ids[row, :length],
            logp=logp[row, :length],
            topk=None if topk is None else TokenTopK(topk[0][row, :length], topk[1][row, :length]),
            versions=np.full(length, version, dtype=np.int64),
            finish="stop" if ended[row] else "length",
            experts=None if experts is None else experts[row][: len(experts[row]) - unread + length - 1],
        )
        for row, length in enumerate(lengths)
    ]


def _stack(columns: Sequence[Tensor | None]) -> np.ndarray:
    """Stack T tensors [B, ...] into [B, T, ...] on the host."""
    return torch.stack([column for column in columns if column is not None], 1).cpu().numpy()
