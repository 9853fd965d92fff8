"""Full rows of logits to what the head would read of them, without any parallel code."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from troll_kernels.sparsify import select

from megatron_troll.types import HeadOutputs, ObjectiveInputs, Segments, TopK


def topk_record(logits: Tensor, target: Tensor, k: int, delta: float) -> TopK:
    """[N, V] logits to the record [N, K + 1] of `support: own`; differentiable in logits."""
    values, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    width = min(k, logits.shape[1])
    lse = logits.logsumexp(1)
    target_logit = logits.gather(1, target[:, None])[:, 0]
    ids, kept, count, place = select(values[:, :width], ids[:, :width], lse, target, target_logit, delta)
    return TopK(ids, kept, count, place, lse, logits.shape[1])


def at_ids(logits: Tensor, old: TopK) -> TopK:
    """The record of `support: old`: `logits` [N, V] at the ids that `old` keeps, no logsumexp."""
    values = logits.gather(1, old.ids.clamp(min=0))
    kept = torch.where(old.valid, values, float("-inf"))
    return TopK(old.ids, kept, old.count, old.place, None, old.vocab)


def sampled_logp(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, target[:, None])[:, 0]


def inputs_of(new: HeadOutputs, old: HeadOutputs, advantage: Tensor, weight: Tensor) -> ObjectiveInputs:
    """N tokens of one response each; rollout log-probs that nothing here reads."""
    each = torch.arange(len(advantage))
    return ObjectiveInputs(
        new=new,
        old=old,
        rollout_logp=torch.zeros_like(advantage),
        rollout_topk=None,
        advantage=advantage,
        weight=weight,
        position=torch.zeros_like(advantage, dtype=torch.int64),
        segments=Segments(
            sum=lambda x: x, expand=lambda x: x, whole=lambda x: x, mine=lambda x: x, owner=each
        ),
        group=each,
        rollout=each,
        rollouts=len(advantage),
        uniform=torch.zeros_like(advantage),
    )


def one_response(new: HeadOutputs, old: HeadOutputs, advantage: Tensor, weight: Tensor) -> ObjectiveInputs:
    """The N tokens of one response."""
    n = len(advantage)
    first = torch.zeros(1, dtype=torch.int64)
    owner = torch.zeros(n, dtype=torch.int64)
    return replace(
        inputs_of(new, old, advantage, weight),
        position=torch.arange(n),
        segments=Segments(
            sum=lambda x: x.sum()[None],
            expand=lambda x: x.expand(n),
            whole=lambda x: x.detach(),
            mine=lambda x: x.detach(),
            owner=owner,
        ),
        group=first,
        rollout=first,
        rollouts=1,
    )


def floats(values: Sequence[float | str], dtype: torch.dtype) -> Tensor:
    """Numbers of a golden file, "-inf" among them."""
    return torch.tensor([float(value) for value in values], dtype=dtype)
