"""The LM head, its records and TROLL on the activations of a real model, SmolLM2-135M, with its 49,152 tokens
on three ranks: loss and all gradients are those of autograd on whole rows in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist.harness import RankPool
from tests.dist.real_head_worker import (
    ALPHA,
    BOUND,
    DELTA,
    P_D,
    TEMPERATURE,
    TP,
    Activations,
    Dtype,
    K,
    Kept,
    Outcome,
    rows_of,
    update,
)
from tests.smollm2 import folder
from tests.unit.objectives.oracle import dense_sparsified, kl, troll

VOCAB = 49152
# Prose, of which K ends most supports, and a count, of which delta does.
TEXT = """In March 1871 the lighthouse keeper saw 14 ships and a whale.<|im_end|>
<|im_start|>assistant
1, 2, 3, 4, 5, 6, 7, 8"""
# Of the norm of a gradient, or of the loss.
TOLERANCE = 1e-5
# In bf16 the gradient of hidden states is rounded to it; that of the head, summed in fp32, is not.
HIDDEN: dict[Dtype, float] = {"fp32": TOLERANCE, "bf16": 2**-8}
# How far rounding may move logits when tokens are chosen.
LOGITS: dict[Dtype, float] = {"fp32": 1e-4, "bf16": 0.25}
# How far it may move the mass of a prefix: by a few units in the last place of a float32 sum. In bf16, what
# lies beyond the prefix, about DELTA, moves by as much as a logit.
MASS: dict[Dtype, float] = {"fp32": 2**-21, "bf16": LOGITS["bf16"] * DELTA}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(TP) as pool:
        yield pool


@pytest.fixture(scope="module")
@torch.no_grad()
def given() -> Activations:
    """The old policy is the model; in the current one, all matrices but the head are 4% off."""
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder())(TEXT, return_tensors="pt")["input_ids"]
    generator = torch.Generator().manual_seed(0)
    old = model.model(ids).last_hidden_state[0, :-1]
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            parameter += 0.04 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    hidden = model.model(ids).last_hidden_state[0, :-1]
    return Activations(folder(), hidden, old, ids[0, 1:], torch.randn(len(old), generator=generator))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_float64_on_whole_rows(
    given: Activations, ranks: RankPool, dtype: Dtype
) -> None:
    hidden, weight, old_logits, logits = dense(given, dtype)
    results = ranks.run(update, given, dtype, ("old", "own"))
    for support in ("old", "own"):
        parts: list[Outcome] = [result[support] for result in results]
        found = parts[0]
        check_kept(found.old, old_logits, given.target, dtype)
        if support == "own":
            check_kept(found.new, logits, given.target, dtype)
        q = dense_sparsified(old_logits, found.old.ids, found.old.used, P_D)
        p = dense_sparsified(logits, found.new.ids, found.new.used, P_D)
        assert 0.1 < (kl(p, q) > BOUND).double().mean() < 0.9
        count = found.old.used.sum(1)
        assert min((count < K).sum(), (count == K).sum()) > 10
        loss = -troll(p, q, given.target, given.advantage.double(), BOUND, ALPHA).mean()
        of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)

        assert {part.loss for part in parts} == {found.loss}
        expected = loss.item()
        assert abs(found.loss - expected) < TOLERANCE * abs(expected)
        summed = torch.stack([part.hidden for part in parts]).double().sum(0)
        assert gap(summed, of_hidden) < HIDDEN[dtype]
        rows = torch.cat([part.rows for part in parts])
        whole = torch.zeros_like(of_weight)
        whole[rows] = torch.cat([part.weight for part in parts]).double()
        assert gap(whole, of_weight) < TOLERANCE
        assert set(rows.tolist()) <= set(found.new.ids[found.new.used].tolist())
        assert all(len(part.rows) > 10 for part in parts)


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def dense(given: Activations, dtype: Dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [N, h], head [V, h], and logits [N, V] of the old and the current policy, in float64 from
    the numbers that the ranks had."""

    def entered(numbers: Tensor) -> Tensor:
        return (numbers.bfloat16() if dtype == "bf16" else numbers).double()

    hidden = entered(given.hidden).requires_grad_()
    weight = entered(rows_of(given.folder, 0, VOCAB)).requires_grad_()
    old = (entered(given.old) @ weight.T).detach()
    return hidden, weight, old / TEMPERATURE, hidden @ weight.T / TEMPERATURE


def check_kept(kept: Kept, logits: Tensor, target: Tensor, dtype: Dtype) -> None:
    """Each row is the prefix that (K, DELTA) asks for, and then the next token unless the prefix has it."""
    for row, ids, used, token in zip(logits.detach().log_softmax(1), kept.ids, kept.used, target):
        chosen = ids[used]
        assert len(chosen.unique()) == len(chosen)
        appended = chosen[-1] == token and is_prefix(row, chosen[:-1], dtype)
        assert appended or (token in chosen and is_prefix(row, chosen, dtype))


def is_prefix(logp: Tensor, chosen: Tensor, dtype: Dtype) -> bool:
    """Whether `chosen` are the fewest of the likeliest tokens with mass 1 - DELTA, or K of them: rounding may
    exchange tokens whose log-probs are nearly equal, and keep one more or fewer."""
    best, count = logp.topk(K).values, len(chosen)
    if not 0 < count <= K:
        return False
    mass = best.exp().cumsum(0)
    enough = count == K or mass[count - 1] >= 1 - DELTA - MASS[dtype]
    needed = count == 1 or mass[count - 2] < 1 - DELTA + MASS[dtype]
    return bool(enough and needed and logp[chosen].min() >= best[count - 1] - LOGITS[dtype])
