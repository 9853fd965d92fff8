"""Sparse records cut from rows of logits."""

import torch
from torch import Tensor
from troll_kernels import sparsify

from megatron_troll.parallel import vocab
from megatron_troll.parallel.groups import Group
from megatron_troll.types import Support, TopK


def own_record(
    logits: Tensor, target: Tensor, lse: Tensor, support: Support, group: Group, size: int
) -> TopK:
    """The record of a policy at its own top-K (`support.kind` is not looked at), from its shard of the logits
    [N, V_padded / tp], the sampled tokens [N] and the logsumexp [N]. Each rank sends N x K candidates."""
    with torch.no_grad():
        target_logit = vocab.gather_logits(logits, target[:, None], group)[:, 0]
        values, candidates = vocab.topk(logits, support.k, group, size)
        ids, _, count, place = sparsify.select(
            values, candidates, lse.detach(), target, target_logit, support.delta
        )
    return TopK(ids, vocab.gather_logits(logits, ids, group), count, place, lse, size)
