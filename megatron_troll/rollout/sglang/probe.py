"""Comparison of the servers' log-probs with the trainer's, on fixed prompts."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_troll.batching.build import Form, build
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.parallel import device
from megatron_troll.mcore.schedule import infer
from megatron_troll.objectives.divergence import topk as divergence
from megatron_troll.parallel.vocab import gather_logits
from megatron_troll.rollout.engine import Setup
from megatron_troll.rollout.sglang.connection import Connection, disk
from megatron_troll.rollout.sglang.http import Passing, UpdateRefused
from megatron_troll.rollout.sglang.transport import Failed, Tensors
from megatron_troll.rollout.sglang.weights import RankZero, delivered
from megatron_troll.types import NO_ID, MicroBatch, Prompt, Rollout, TokenTopK

# Top-K entries of a server's distribution; the rest of it is compared as one bucket.
TOP_K = 64


@dataclass(frozen=True)
class Gap:
    """KL(engine || trainer) over the probed tokens, nats; the rest is one bucket, so at most the full KL."""

    mean: float
    p99: float


@dataclass(frozen=True)
class Probed:
    """Token ids [n]; the last `scored` of them are compared."""

    ids: np.ndarray
    scored: int


def gaps(
    model: MegatronModel, probed: Sequence[Probed], served: Mapping[str, Sequence[TokenTopK]]
) -> dict[str, Gap]:
    """The gap of each server, from its distributions [n - 1, k] of every sequence. Every rank calls with the
    same arguments and returns the same. Holds full rows of the scored tokens, tokens x V / tp, on the last
    stage."""
    batches = [_batch(one, model) for one in probed]
    # The interleaved schedule needs a multiple of the number of stages.
    spare = -len(batches) % model.groups.pp.size
    rows = infer(model, batches + batches[:1] * spare, lambda i, hidden: Head(model).log_probs(hidden))
    found = {
        url: _numbers(model, probed, batches, rows[: len(batches)], laws) for url, laws in served.items()
    }
    return {url: Gap(float(kl.mean()), float(np.quantile(kl, 0.99))) for url, kl in found.items()}


def _numbers(
    model: MegatronModel,
    probed: Sequence[Probed],
    batches: Sequence[MicroBatch],
    rows: Sequence[Tensor],
    laws: Sequence[TokenTopK],
) -> np.ndarray:
    """The KL of every scored token, gathered from the context-parallel ranks, on every rank."""
    groups = model.groups
    parts = [_kl(model, one, batch, logp, law) for one, batch, logp, law in zip(probed, batches, rows, laws)]
    mine = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
    whole = np.concatenate(groups.cp.all_gather_objects(mine))
    return groups.pp.broadcast_object(whole, groups.pp.size - 1)


def _kl(model: MegatronModel, one: Probed, batch: MicroBatch, logp: Tensor, law: TokenTopK) -> Tensor:
    """KL [N] of this rank's scored tokens of one sequence, from the trainer's rows [N, V / tp]."""
    at = len(law.ids) - one.scored + batch.position.cpu().numpy()
    ids = torch.from_numpy(law.ids[at]).long().to(logp.device)
    engine = torch.from_numpy(law.logp[at]).to(logp.device)
    trainer = gather_logits(logp, ids, model.groups.tp)
    return divergence(engine, trainer, ids != NO_ID, model.shape.vocab, "topk_kl")


def _batch(one: Probed, model: MegatronModel) -> MicroBatch:
    """Build one micro-batch from a sequence; its loss tokens are the scored ones."""
    nothing = np.zeros(one.scored, dtype=np.float32)
    rollout = Rollout(
        prompt=Prompt("probe", (), ""),
        group=0,
        sample=0,
        prompt_ids=one.ids[: -one.scored],
        response_ids=one.ids[-one.scored :],
        marks=np.ones(one.scored, dtype=np.int32),
        logp=nothing,
        key=0,
        topk=None,
        text="",
        finish="stop",
        temperature=1.0,
    )
    return build([rollout], [0.0], [0.0], [0], Form.of(model.groups, model.shape.vocab)).to(device())


def sequences(prompts: Sequence[np.ndarray], tokens: int) -> list[Probed]:
    """Each prompt of more than one token, scored on its last `tokens` tokens."""
    return [Probed(ids, min(tokens, len(ids) - 1)) for ids in prompts if len(ids) > 1]


NUMBER = re.compile(r"\.\d+(?=\.|$)")


def told(rank_zero: RankZero, url: str, setup: Setup) -> str:
    """Describe which weights of the server at `url` are wrong: they are compared, parameter by parameter,
    with those it has after loading a fresh export. The server loses its weight version by this.
    Blocks on all ranks."""

    def load_afresh(connection: Connection, tensors: Tensors) -> Failed:
        afresh = disk(setup, connection.background, connection.control, max_bytes=2**30)
        return afresh.deliver(tensors, [url], f"{connection.versions.run}.diagnosis")

    def sums(connection: Connection) -> dict[str, str]:
        return connection.background.run(connection.control.checksums(url))

    try:
        before = rank_zero.first(sums)
        lost = delivered(rank_zero, [url], load_afresh)
        after = rank_zero.first(sums) if url not in lost else {}
    except (Passing, UpdateRefused) as error:
        return f"Its weights cannot be compared with the trainer's: {error}"
    differing = families(before, after)
    if not differing:
        return (
            "Its weights are what the trainer exports, so they do not explain the gap: compare dtype, KV "
            "cache and quantisation with the trainer's, and for a new model family its weight table"
        )
    return (
        f"At fault: {', '.join(differing)}. They are not what the trainer exports: rollout.sglang.sync.via "
        "does not transfer them correctly; try another value, and report it"
    )


def families(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Parameters whose hash differs, grouped by name without numbers, with the count of those that differ."""
    everything = Counter(NUMBER.sub(".*", name) for name in before)
    differing = Counter(NUMBER.sub(".*", name) for name in before if before[name] != after.get(name))
    return [f"{name} ({count} of {everything[name]})" for name, count in sorted(differing.items())]
