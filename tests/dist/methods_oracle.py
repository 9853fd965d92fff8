"""What every method must give, on one process: Hugging Face's model runs each sequence alone in float64, and
the objective reads its full rows of logits at once, as in the unit tests. Nothing here uses batching,
packing, micro-batches, sharding, the LM head or the trainer.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_troll.batching.uniforms import token_uniforms
from megatron_troll.config import ObjectiveConfig
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives import compose
from megatron_troll.types import LossTerms, ObjectiveInputs
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, Unstacked
from tests.dist.layouts_batch import Weights
from tests.dist.layouts_reference import Read, read
from tests.dist.methods_batch import ENGINE_K, Batch, model_of
from tests.dist.methods_table import Method
from tests.dist.tiny import MOE
from tests.unit.objectives.rows import Rows

POLICIES = ("new", "old", "mu", "reference")


@dataclass(frozen=True)
class Expected:
    """loss, the gradients of all Hugging Face tensors by name, and the mean of each diagnostic over the
    tokens that have it."""

    loss: float
    gradients: Weights
    means: dict[str, float]


def kish_share(weights: Tensor) -> float:
    """Kish's effective sample size of weights [N], as a share of N; a NaN is a token without a weight."""
    known = weights[weights.isfinite()]
    return (known.sum() ** 2 / known.square().sum() / len(known)).item()


class Oracle:
    """Loss, gradients and diagnostics of the batch at its weights `now`."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        with torch.no_grad():
            self.before = read(model_of(batch.before), batch.rollouts)
            self.frozen = read(model_of(batch.frozen), batch.rollouts)
        self.model = model_of(batch.now)
        self.now = read(self.model, batch.rollouts)

    @property
    def reads(self) -> tuple[Read, ...]:
        return self.before, self.now, self.frozen

    def expected(self, method: Method) -> Expected:
        rows = self.rows(method.config)
        terms = self.terms(method, rows)
        (upstream,) = torch.autograd.grad(terms.loss, rows.new)
        self.model.zero_grad()
        self.now.logits.backward(upstream, retain_graph=True)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        source = Unstacked(TensorSource(gradients), table_of(shape_of(MOE)))
        means = {name: values.nanmean().item() for name, values in terms.per_token.items()}
        if (weights := terms.per_token.get("correction_weight")) is not None:
            means["effective_sample_size"] = kish_share(weights)
        if terms.pulls is not None:
            of_group = [terms.pulls[rows.group == group] for group in rows.group.unique()]
            told = [values[values.isfinite()].numpy() for values in of_group]
            means["asymmetry"] = float(np.mean([np.var(values) for values in told if len(values) > 1]))
        return Expected(terms.loss.item(), {name: source.read(name).clone() for name in source.shapes}, means)

    def slope(self, method: Method, shake: float) -> Tensor:
        """dloss / dlogits [N, V] where all logits are first moved by noise of size `shake`."""
        rows, generator = self.rows(method.config), torch.Generator().manual_seed(0)
        for name in POLICIES:
            logits = getattr(rows, name)
            noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
            rows = replace(rows, **{name: logits.detach() + shake * noise})
        rows.new.requires_grad_()
        (slope,) = torch.autograd.grad(self.terms(method, rows).loss, rows.new)
        return slope

    def terms(self, method: Method, rows: Rows) -> LossTerms:
        objective = compose(method.config)
        inputs = rows.inputs(objective, ENGINE_K)
        inputs = replace(inputs, aggregation=method.config.aggregation)
        if method.config.advantage.name == "gae":
            inputs = self._with_token_advantages(inputs)
        return objective.loss(inputs, objective.statistics(inputs))

    def rows(self, config: ObjectiveConfig) -> Rows:
        rollouts, told = self.batch.rollouts, self._told
        lengths = torch.tensor([int(kept.sum()) for kept in told])
        target = np.concatenate([r.response_ids[kept] for r, kept in zip(rollouts, told)])
        uniform = np.concatenate([token_uniforms(r.key, len(kept))[kept] for r, kept in zip(rollouts, told)])
        return Rows(
            new=self.now.logits.detach().requires_grad_(),
            old=self.before.logits,
            mu=self.batch.engine,
            reference=self.frozen.logits,
            target=torch.from_numpy(target),
            weight=weights(lengths, config).repeat_interleave(lengths),
            uniform=torch.from_numpy(uniform),
            owner=torch.arange(len(rollouts)).repeat_interleave(lengths),
            advantage=torch.tensor(self.batch.advantages, dtype=torch.float64),
            group=torch.tensor([r.group for r in rollouts]),
            rollout=torch.arange(len(rollouts)),
            rollouts=len(rollouts),
        )

    def _with_token_advantages(self, inputs: ObjectiveInputs) -> ObjectiveInputs:
        each = [a[kept] for a, kept in zip(self.batch.token_advantages, self._told)]
        return replace(inputs, advantage=torch.from_numpy(np.concatenate(each)), response_advantage=None)

    @property
    def _told(self) -> list[np.ndarray]:
        return [rollout.mask > 0 for rollout in self.batch.rollouts]


def weights(lengths: Tensor, config: ObjectiveConfig) -> Tensor:
    """[S] of one token of each response, float64 (ALGORITHMS 0)."""
    spread = lengths.double()
    if config.aggregation == "token-mean":
        return torch.ones_like(spread) / spread.sum()
    if config.aggregation == "seq-mean-token-mean":
        return 1 / (spread * (spread > 0).sum())
    assert config.sum_norm_length is not None
    return torch.ones_like(spread) / (len(spread) * config.sum_norm_length)
