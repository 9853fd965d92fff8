"""Objectives that the benchmarks compare, and the LM head of a trainer that keeps whole rows of logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from troll_kernels.sparsify import select, sparse_logp
from troll_kernels.transform import LOWEST, widened

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.mcore.head import Head, HeadContext, Scan, record_of
from megatron_troll.objectives.compose import compose
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Policy, Statistics
from megatron_troll.objectives.sparse import Sparse
from megatron_troll.objectives.trust_region.clip import Clip
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs, Support, TopK


def troll(**fields: Any) -> Objective:
    return compose(ObjectiveConfig(trust_region=Slot(name="troll", **fields)))  # pyright: ignore[reportCallIssue]


def clip() -> Objective:
    return compose(ObjectiveConfig(trust_region=Slot(name="clip")))


def sparse_clip(k: int) -> Objective:
    return Objective(**{**vars(clip()), "trust_region": SparseClip(k=k)})


class SparseClip(Sparse, Clip):
    """PPO-clip on TROLL's sparse policies, without projection: the effect of the K-column gradient alone."""

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(topk=Support("own", self.k, self.delta))

    def prepare_old(self, old: HeadOutputs) -> HeadOutputs:
        return old

    def policy(self, inputs: ObjectiveInputs, statistics: Statistics | None) -> Policy:
        old, new = inputs.old.topk, inputs.new.topk
        assert old is not None
        assert new is not None
        logp, before = (
            sparse_logp(topk.logits, topk.count, topk.vocab, self.p_d).gather(1, old.place[:, None])[:, 0]
            for topk in (new, old)
        )
        return Policy(logp, before, torch.zeros_like(logp))


class MaterialisedHead(Head):
    """A head that uses plain autograd on logits [N, V], which are kept until backward; one rank only."""

    def scan(self, hidden: Tensor, target: Tensor, *requests: HeadRequest) -> Scan:
        return Scan(self.entered(hidden), target, None, None)

    def outputs(self, scan: Scan, reads: HeadRequest, beside: HeadContext | None = None) -> HeadOutputs:
        target = scan.target
        product = F.linear(scan.hidden, self.model.stages[-1].output_weight)
        logits = self.shard.transform.apply(widened(product))
        old = None if beside is None else beside.old
        return HeadOutputs(
            logp=-F.cross_entropy(logits, target, reduction="none") if reads.logp else None,
            topk=None if reads.topk is None else kept(logits, target, reads.topk, old),
            entropy=None,
        )


def kept(logits: Tensor, target: Tensor, support: Support, old: HeadOutputs | None) -> TopK:
    """The top-K record of whole rows of logits [N, V], differentiable in them."""
    vocab, lse = logits.shape[1], logits.detach().logsumexp(1)
    if support.kind == "old":
        record = record_of(old, support)
        ids, count, place = record.ids, record.count, record.place
    else:
        values, ids = logits.detach().topk(min(support.k, vocab))
        sampled = logits.detach().gather(1, target[:, None])[:, 0]
        ids, _, count, place = select(values, ids, lse, target, sampled, support.delta)
    at_ids = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, LOWEST)
    return TopK(ids, at_ids, count, place, lse, vocab)
