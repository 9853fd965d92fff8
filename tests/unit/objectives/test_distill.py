"""Distillation against the KL of two distributions in which all tokens that are not kept are one."""

import pytest
import torch
from torch import Tensor

from megatron_troll.objectives.distill import REST, kept_kl

N, V, K = 7, 40, 6


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged(logp: Tensor, ids: Tensor) -> Tensor:
    """[N, K + 1] probabilities: the kept tokens, and the sum of all others, added up one by one."""
    p = logp.exp()
    others = torch.ones_like(p, dtype=torch.bool).scatter(1, ids, False)
    return torch.cat([p.gather(1, ids), (p * others).sum(1, keepdim=True)], 1)


def at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probs at `ids` as a record has them: with the gradient of the logsumexp too."""
    return logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)


def test_value_and_gradient_are_those_of_the_merged_distributions() -> None:
    teacher, student = logits(0), logits(1).requires_grad_()
    ids = teacher.topk(K).indices
    value = kept_kl(at(teacher, ids), at(student, ids), torch.ones_like(ids, dtype=torch.bool))
    p, q = merged(teacher.log_softmax(1), ids), merged(student.log_softmax(1), ids)
    wanted = (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(value, wanted)
    weight = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * value).sum(), student)
    (by_hand,) = torch.autograd.grad((weight * wanted).sum(), student)
    torch.testing.assert_close(gradient, by_hand)
    full = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert (value >= 0).all()
    assert (value < full).all()


def test_with_the_whole_vocabulary_kept_it_is_the_kl() -> None:
    teacher, student = logits(2), logits(3).requires_grad_()
    ids = teacher.argsort(1, descending=True)
    value = kept_kl(at(teacher, ids), at(student, ids), torch.ones_like(ids, dtype=torch.bool))
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(value, (p * (p.log() - q.log())).sum(1))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, (q - p).detach())


def test_slots_that_are_not_kept_say_nothing() -> None:
    teacher, student = logits(4), logits(5)
    ids = teacher.topk(K).indices
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, -1] = False
    noise = torch.full((N, 1), float("-inf"), dtype=torch.float64)
    padded = [torch.cat([at(each, ids)[:, :-1], noise], 1) for each in (teacher, student)]
    torch.testing.assert_close(kept_kl(*padded, kept), kept_kl(*(x[:, :-1] for x in padded), kept[:, :-1]))


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_masses_that_are_rounding_give_no_nan(scale: float) -> None:
    """A sure teacher, a student that is sure of something else, in float32."""
    teacher, student = logits(6, scale).float(), logits(7, scale).float().requires_grad_()
    ids = teacher.topk(K).indices
    value = kept_kl(at(teacher, ids), at(student, ids), torch.ones_like(ids, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value > -REST).all()
    assert gradient.abs().sum() > 0
