"""This rank's rows of the LM head, with results combined over all parts of the vocabulary.

Megatron reduces a bucket of gradients as soon as autograd has passed each of its weights. The head adds the
gradient of its weight to `main_grad` itself, without autograd, and therefore reports when that is complete.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from troll_kernels import head as kernels
from troll_kernels.transform import Transform

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.parallel import shards
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class Rows:
    """Statistics of N positions over the whole vocabulary: logsumexp (float64) and entropy (float32, nats) of
    the logits, logit of the sampled token (float32); [N]."""

    lse: Tensor
    entropy: Tensor
    target: Tensor

    @property
    def logp(self) -> Tensor:
        """Log-prob of the sampled token, float32."""
        return (self.target - self.lse).to(self.target.dtype)


@dataclass(frozen=True)
class HeadShard:
    """Part of the head: weight [V_padded / tp, h] has the tokens from `first` on. With data parallelism its
    gradient is added to `main_grad` during backward, outside autograd. No method holds N x V / tp."""

    weight: Tensor
    main_grad: Tensor | None
    first: int
    vocab: int
    shard: kernels.Shard
    tp: Group

    @property
    def transform(self) -> Transform:
        return self.shard.transform

    def rows(self, hidden: Tensor, target: Tensor) -> Rows:
        """Rows with gradient; backward recomputes the logits, one chunk at a time."""
        target = target - self.first
        found = kernels.dense_statistics(hidden, self.weight, target, self.shard, self.main_grad)
        return self._together(*found)

    def selection(self, hidden: Tensor, target: Tensor, k: int) -> tuple[Rows, Tensor, Tensor]:
        """Rows, and the min(k, V) largest logits [N, K] with their ids: value descending, then id ascending.
        Without gradient."""
        found = kernels.candidates(hidden.detach(), self.weight.detach(), target - self.first, k, self.shard)
        ids = torch.where(found.columns < 0, found.columns, found.columns + self.first)
        values, ids = shards.merged(found.values, ids, self.tp, self.vocab)
        return self._together(found.lse, found.mean, found.target), self.transform.apply(values), ids

    def logits_at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [N, W] at `ids` [N, W] int64, -inf where the id is NO_ID. Differentiable, W columns wide:
        neither forward nor backward computes a whole row of the vocabulary."""
        columns = ids - self.first
        own = (ids >= 0) & (columns >= 0) & (columns < self.shard.width)
        mine = torch.where(own, columns, -1)
        local = kernels.sparse_logits(hidden, self.weight, mine, main_grad=self.main_grad)
        return self.transform.apply(shards.from_owners(local, ids, own, self.tp))

    def _together(self, lse: Tensor, mean: Tensor, target: Tensor) -> Rows:
        lses = shards.stacked(lse, self.tp)
        whole = lses.logsumexp(0)
        entropy = whole - ((lses - whole).exp() * shards.stacked(mean, self.tp)).sum(0)
        target = self.transform.apply(shards.stacked(target, self.tp).amax(0))
        return Rows(whole, entropy.to(target.dtype), target)


def shard_of(model: MegatronModel, temperature: float, chunk: int | None = None) -> HeadShard:
    """This rank's part of the head on the model's last stage. Logits go through the model's soft-cap, if any,
    and are then divided by `temperature`. `chunk`: tokens whose logits are held at once; the default depends
    on the device."""
    weight, tp, vocab = model.stages[-1].output_weight, model.groups.tp, model.shape.vocab
    main_grad = getattr(weight, "main_grad", None)
    first = tp.rank * len(weight)
    width = min(max(vocab - first, 0), len(weight))
    transform = Transform(temperature, model.shape.softcap)
    shard = kernels.Shard(width, chunk or kernels.chunk_size(weight.device), transform)
    return HeadShard(weight if main_grad is None else weight.detach(), main_grad, first, vocab, shard, tp)


def reporting(hidden: Tensor, model: MegatronModel) -> Tensor:
    """Return `hidden` [N, h] as the input of the head, once per micro-batch: when backward has passed
    everything computed from it, the gradient of the head's weight is reported to Megatron as complete.

    In its first step Megatron counts the reports of each weight, and then waits for as many: if the embedding
    of the same stage is tied to the head, this includes the embedding's report.
    """
    chunk = model.chunks[-1]
    if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.overlap_grad_reduce:
        return hidden
    weight = model.stages[-1].output_weight
    group: Any = chunk.param_to_bucket_group[weight]

    def ready() -> None:
        group.register_grad_ready(weight, chunk.force_all_reduce)

    result = _Reporting.apply(hidden, ready)
    assert isinstance(result, Tensor)
    return result


class _Reporting(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ready: Callable[[], None]) -> Tensor:
        ctx.ready = ready
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ready()
        return upstream, None
