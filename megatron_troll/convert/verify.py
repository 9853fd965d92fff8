"""Check that two folders hold the same model: compare logits of Hugging Face's code and Megatron's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_troll.config import Layout, Model
from megatron_troll.convert.plan import BothFormats
from megatron_troll.launch.local import rank_environment
from megatron_troll.launch.ports import free_port
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import build
from megatron_troll.mcore.shape import read_shape
from megatron_troll.parallel.groups import Groups
from megatron_troll.weights.checkpoint_source import checkpoint_of
from megatron_troll.weights.load import load

PROMPTS, LENGTH, SEED = 4, 32, 0
# In fp32, relative to the largest logit. Our linear attention sums in a different order from Hugging Face's.
TOLERANCE, TOLERANCE_LINEAR = 1e-5, 1e-4


@dataclass(frozen=True)
class LogitComparison:
    """The largest difference between two logits, the largest logit, and the allowed difference."""

    difference: float
    largest: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        verdict = "the same model" if self.equal else "NOT the same model"
        return (
            f"{verdict}: logits of {PROMPTS} prompts of {LENGTH} tokens differ by at most "
            f"{self.difference:.1e} (allowed {self.tolerance:.1e}; the largest is {self.largest:.1f})"
        )


def compare(sides: BothFormats, dtype: torch.dtype | None) -> LogitComparison:
    """Compare the logits of both models in fp32, one model after the other, on prompts of fixed token ids.
    `dtype`: what the conversion rounded the weights to. Holds each model whole in fp32."""
    shape = read_shape(sides.like)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, shape.vocab, (PROMPTS, LENGTH), generator=generator)
    there, here = _hugging_face(sides, tokens, dtype), _megatron(sides, tokens, dtype)
    largest = float(there.abs().max())
    relative = TOLERANCE if shape.linear is None else TOLERANCE_LINEAR
    return LogitComparison(float((here - there).abs().max()), largest, relative * max(largest, 1.0))


@torch.no_grad()
def _hugging_face(sides: BothFormats, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        sides.hugging_face, dtype=torch.float32, attn_implementation="eager"
    )
    _round(model, dtype)
    return model.eval()(tokens).logits


@torch.no_grad()
def _megatron(sides: BothFormats, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    shape = read_shape(sides.like)
    config = Model(path=str(sides.like), dtype="fp32", spec="local")
    with _alone() as groups:
        model = build(config, shape, groups, trained=False)
        load(model, checkpoint_of(sides.megatron, shape))
        _round(model.chunks[0], dtype)
        model.train(False)
        device = parallel.device()
        positions = torch.arange(LENGTH, device=device).expand(PROMPTS, LENGTH)
        padding = torch.zeros(PROMPTS, LENGTH, dtype=torch.bool, device=device)
        hidden = model.chunks[0](tokens.to(device), positions, None, padding_mask=padding)
        logits = Head(model).logits(hidden.transpose(0, 1).reshape(PROMPTS * LENGTH, -1))
        return logits.view(PROMPTS, LENGTH, -1).cpu()


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Round the weights to `dtype`: the conversion did so on one side, this does it on both."""
    for tensor in model.state_dict().values() if dtype is not None else ():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


@contextmanager
def _alone() -> Iterator[Groups]:
    """Start the groups of a single process, until the block ends."""
    threads = torch.get_num_threads()
    os.environ |= rank_environment(0, 1, free_port(), threads)
    groups = parallel.start(Layout(), SEED)
    try:
        yield groups
    finally:
        parallel.stop()
