"""What a rank runs for test_real_head: the sparse path of training over a third of a real vocabulary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_troll.config import Layout, Model, ObjectiveConfig, Optimizer, Slot
from megatron_troll.mcore.head import Head, HeadContext
from megatron_troll.mcore.model import build
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives import compose
from megatron_troll.types import HeadOutputs
from tests.dist.tiny import started
from tests.unit.golden.records import inputs_of

TP, TEMPERATURE = 3, 0.7
K, DELTA, P_D, BOUND, ALPHA = 64, 1e-5, 1e-12, 0.05, 1.0
TROLL = {"name": "troll", "k": K, "delta": DELTA, "p_d": P_D, "bound": BOUND, "alpha": ALPHA}
EMBEDDING = "model.embed_tokens.weight"
Dtype = Literal["fp32", "bf16"]
Support = Literal["own", "old"]


@dataclass(frozen=True)
class Activations:
    """hidden, old [N, h] float32: final hidden states of the current and the old policy at N tokens of a
    text, whose next tokens are target [N]; advantage [N]. The head of both is that of `folder`."""

    folder: Path
    hidden: Tensor
    old: Tensor
    target: Tensor
    advantage: Tensor


@dataclass(frozen=True)
class Kept:
    """ids [N, W] of a policy's tokens, and which slots [N, W] are used."""

    ids: Tensor
    used: Tensor


@dataclass(frozen=True)
class Outcome:
    """loss; this rank's part of the gradient of the hidden states [N, h]; the tokens [R] whose rows of the
    head have a gradient, and that gradient [R, h]; what the old and the current policy keep."""

    loss: float
    hidden: Tensor
    rows: Tensor
    weight: Tensor
    old: Kept
    new: Kept


def rows_of(folder: Path, first: int, last: int) -> Tensor:
    """Rows of the embedding, which is the head: [last - first, h] float32."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_slice(EMBEDDING)[first:last]


def update(given: Activations, dtype: Dtype, supports: Sequence[Support]) -> dict[str, Outcome]:
    """Loss and gradients in a trainer's model of one layer, of which only the head has its real weights."""
    shape = shape_of(json.loads((given.folder / "config.json").read_text()) | {"num_hidden_layers": 1})
    config = Model(path="", dtype=dtype, layout=Layout(tp=TP), optimizer=Optimizer(distributed=False))
    with started(config.layout) as groups:
        model = build(config, shape, groups)
        weight: Any = model.stages[-1].output_weight
        first = groups.tp.rank * len(weight)
        with torch.no_grad():
            weight.copy_(rows_of(given.folder, first, first + len(weight)))
        head = Head(model, TEMPERATURE)
        return {support: _one(given, head, support, weight.main_grad, first) for support in supports}


def _one(given: Activations, head: Head, support: Support, main_grad: Tensor, first: int) -> Outcome:
    """The old policy's record, the current one's, the loss, backward."""
    objective = compose(ObjectiveConfig(trust_region=Slot.model_validate(TROLL | {"support": support})))
    main_grad.zero_()
    with torch.no_grad():
        old = objective.check_old(head.read(given.old, given.target, objective.reads_old))
    hidden = given.hidden.clone().requires_grad_()
    new = head.read(hidden, given.target, objective.reads, HeadContext(old=old))
    weight = torch.full_like(given.advantage, 1 / len(given.advantage))
    loss = objective.loss(inputs_of(new, old, given.advantage, weight)).loss
    loss.backward()
    assert hidden.grad is not None
    rows = main_grad.any(1).nonzero()[:, 0]
    return Outcome(loss.item(), hidden.grad, rows + first, main_grad[rows], _kept(old), _kept(new))


def _kept(readings: HeadOutputs) -> Kept:
    assert readings.topk is not None
    return Kept(readings.topk.ids, readings.topk.valid)
