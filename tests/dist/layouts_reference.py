"""What every layout must give, by plain autograd on one process.

Hugging Face's model runs each sequence alone and unpadded, in float64 but for its norms and softmaxes; the
objectives are written out over the whole vocabulary. Nothing here uses batching, packing, sharding or the
objectives of the package.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import Rollout
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, Unstacked
from tests.dist.layouts_batch import (
    ALPHA,
    BOUND,
    DELTA,
    EPS_HIGH,
    EPS_LOW,
    OPTIMIZER,
    P_D,
    TEMPERATURE,
    Batch,
    K,
    Weights,
)
from tests.dist.tiny import MOE, logits_of, reference
from tests.unit.objectives.oracle import dense_sparsified, kl, projected

Old = Literal["trainer", "engine"]
Replay = Literal["none", "old", "rollout"]


@dataclass(frozen=True)
class Read:
    """logits [N, V] after temperature where the N loss tokens are predicted; routing, per layer, the router's
    logits [T, E] over every token of every sequence, float64; experts [T, layers, k] that they went to."""

    logits: Tensor
    routing: list[Tensor]
    experts: Tensor


@dataclass(frozen=True)
class Tokens:
    """The N loss tokens: target, advantage, weight of a token under token-mean and seq-mean-token-mean."""

    target: Tensor
    advantage: Tensor
    token_mean: Tensor
    sequence_mean: Tensor


@dataclass(frozen=True)
class Expected:
    """loss, the gradients of all Hugging Face tensors by name, and how AdamW changes `now` by them."""

    loss: float
    gradients: Weights
    change: Weights


# What a record of fewer than 256 experts holds at a token whose routing is not known.
UNRECORDED = 255


class Reference:
    """Loss and gradients of the batch at its weights `now`; `before` is what the model gives at the weights
    `before`, or what the rollout engine gave. `replay`: `now` goes to the experts of `before` (old), or both
    to those of the rollouts."""

    def __init__(self, batch: Batch, old: Old, replay: Replay = "none") -> None:
        self.batch = batch
        self.tokens = tokens_of(batch)
        self.model = reference(batch.config).double()
        if "num_experts" in batch.config:
            self.model.set_experts_implementation("eager")  # the grouped one has no float64
        engine = Read(batch.law.double(), [], torch.empty(0))
        self.before = self._at_before(replay) if old == "trainer" else engine
        _fill(self.model, batch.now)
        given = {"none": None, "old": self.before.experts, "rollout": recorded(batch)}[replay]
        self.now = read(self.model, batch.rollouts, given)
        self.share = counted(batch.rollouts, shared=replay != "rollout")
        self.kept_before = _support(self.before, self.tokens)
        self.kept_now = _support(self.now, self.tokens)

    @torch.no_grad()
    def _at_before(self, replay: Replay) -> Read:
        _fill(self.model, self.batch.before)
        given = recorded(self.batch) if replay == "rollout" else None
        return read(self.model, self.batch.rollouts, given)

    def expected(self, objective: str, aux: float) -> Expected:
        """Of a named objective, plus the balancing loss with coefficient `aux` in the gradients."""
        loss = -self.value(objective)
        total = loss + aux * balancing_loss(self.now, self.share) if aux else loss
        self.model.zero_grad()
        total.backward(retain_graph=True)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        change = adamw_change(self.batch.now, gradients)
        return Expected(loss.item(), self._listed(gradients), self._listed(change))

    def _listed(self, tensors: Weights) -> Weights:
        """By the names of a checkpoint, which keeps every expert apart."""
        source = Unstacked(TensorSource(tensors), table_of(shape_of(self.batch.config)))
        return {name: source.read(name).clone() for name in source.shapes}

    def value(self, objective: str) -> Tensor:
        """The objective, to be maximised."""
        tokens = self.tokens
        if objective == "clip":
            ratio = self.ratio
            bounded = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
            score = torch.minimum(ratio * tokens.advantage, bounded * tokens.advantage)
            return (tokens.sequence_mean * score).sum()
        p, q = self.sparse(objective)
        return (tokens.token_mean * troll(p, q, tokens)).sum()

    @property
    def ratio(self) -> Tensor:
        at = self.tokens.target[:, None]
        now, before = self.now.logits.log_softmax(1), self.before.logits.log_softmax(1)
        return (now.gather(1, at) - before.gather(1, at))[:, 0].exp()

    def sparse(self, objective: str) -> tuple[Tensor, Tensor]:
        """p' and q' [N, V] of eq. 21, of the weights now and before."""
        kept = self.kept_now if objective == "troll-own" else self.kept_before
        q = dense_sparsified(self.before.logits, *self.kept_before, P_D)
        return dense_sparsified(self.now.logits, *kept, P_D), q

    def kl_before(self, objective: str) -> Tensor:
        """[N] KL(new' || old'), what the trust region bounds."""
        return kl(*self.sparse(objective)).detach()


def adamw_change(weights: Weights, gradients: Weights) -> Weights:
    """What the first step of AdamW on the clipped gradients adds. Vectors do not decay, as in Megatron."""
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    clip = min(1.0, OPTIMIZER.grad_norm / float(norm))
    change = {}
    for name, weight in weights.items():
        parameter = weight.double().requires_grad_()
        parameter.grad = clip * gradients[name]
        decay = OPTIMIZER.weight_decay if weight.dim() > 1 else 0.0
        AdamW([parameter], OPTIMIZER.lr, OPTIMIZER.betas, OPTIMIZER.eps, decay).step()
        change[name] = parameter.detach() - weight
    return change


@torch.no_grad()
def _fill(model: nn.Module, weights: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def troll(p: Tensor, q: Tensor, tokens: Tokens) -> Tensor:
    """J [N] of arXiv 2510.03817, eq. 5, from p' and q' [N, V]."""
    pi = projected(p, q, BOUND)
    at = tokens.target[:, None]
    return (pi.gather(1, at) / q.gather(1, at))[:, 0] * tokens.advantage - ALPHA * kl(p, pi.detach())


def read(model: nn.Module, rollouts: Sequence[Rollout], given: Tensor | None = None) -> Read:
    """Each sequence alone: prompt and response without the last token; to the experts `given`
    [T, layers, k], where there are any."""
    logits, routing, start = [], [], 0
    for rollout in rollouts:
        ids = torch.tensor([*rollout.prompt_ids, *rollout.response_ids])[:-1]
        mine = None if given is None else given[start : start + len(ids)]
        start += len(ids)
        with routers_watched(model, mine) as seen:
            output = logits_of(model, ids[None])[0]
        first = len(rollout.prompt_ids) - 1
        logits.append(output[first:][torch.from_numpy(rollout.mask) > 0])
        routing.append(seen)
    layers = [torch.cat(layer) for layer in zip(*routing)]
    nowhere = torch.full((start, MOE["num_experts_per_tok"]), UNRECORDED)
    picks = [with_own(nowhere if given is None else given[:, i], layer) for i, layer in enumerate(layers)]
    return Read(torch.cat(logits) / TEMPERATURE, layers, torch.stack(picks, 1) if picks else torch.empty(0))


def with_own(given: Tensor, logits: Tensor) -> Tensor:
    """[T, k] experts that tokens go to: those `given`, and the router's own where they were not recorded."""
    return torch.where(given == UNRECORDED, logits.topk(given.shape[1], 1).indices, given)


def recorded(batch: Batch) -> Tensor:
    """[T, layers, k] of the rollouts; empty where they have none."""
    found = [torch.from_numpy(r.experts).long() for r in batch.rollouts if r.experts is not None]
    return torch.cat(found) if found else torch.empty(0)


@contextmanager
def routers_watched(model: nn.Module, given: Tensor | None) -> Iterator[list[Tensor]]:
    """The router logits [T, E] of each layer, computed from what the router is given. With `given`
    [T, layers, k] the tokens go there instead, with the probabilities that the router gives to it."""
    seen: list[Tensor] = []

    def watch(gate: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer, logits = len(seen), F.linear(inputs[0], gate.weight)
        seen.append(logits)
        if given is None:
            return output
        experts = with_own(given[:, layer], logits)
        weights = logits.softmax(1).gather(1, experts)
        if gate.norm_topk_prob:
            weights = weights / weights.sum(1, keepdim=True)
        return output[0], weights, experts

    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(watch) for gate in gates]
    yield seen
    for hook in hooks:
        hook.remove()


def balancing_loss(read: Read, share: Tensor) -> Tensor:
    """Switch Transformer's (arXiv:2101.03961, eq. 4) for top-k over all tokens, of which each counts `share`
    [T], summed over the layers: E sum_e f_e P_e, f_e the fraction of choices that fell on expert e, P_e its
    mean probability."""
    losses = []
    for layer, logits in enumerate(read.routing):
        experts, picks = logits.shape[1], read.experts[:, layer]
        chosen = F.one_hot(picks, experts).sum(1).double()
        fraction = (share @ chosen) / (share.sum() * picks.shape[1])
        losses.append(experts * (fraction * (share @ logits.softmax(1) / share.sum())).sum())
    return torch.stack(losses).sum()


def counted(rollouts: Sequence[Rollout], shared: bool) -> Tensor:
    """[T] of every sequence: a token counts once for all responses of its group that begin alike up to the
    end of its prompt or turn, if `shared`: they recorded the same experts, or none."""
    if not shared:
        return torch.ones(sum(len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts)).double()
    begun = [beginnings(rollout) for rollout in rollouts]
    sizes = Counter(beginning for path in begun for beginning in set(path))
    return torch.tensor([1 / sizes[beginning] for path in begun for beginning in path]).double()


def beginnings(rollout: Rollout) -> list[tuple[object, ...]]:
    """For each token that is read, all that is read up to the end of its prompt or turn; its own, of the last
    turn and of a prompt that nothing follows."""
    ids = [*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()][:-1]
    turns = [-1] * len(rollout.prompt_ids) + (rollout.mask > 0).tolist()
    ends = [i for i in range(1, len(turns)) if turns[i] != turns[i - 1]]
    found: list[tuple[object, ...]] = []
    for i in range(len(ids)):
        end = next((end for end in ends if end > i), None)
        found.append((id(rollout),) if end is None else (rollout.group, *ids[:end], *turns[:end]))
    return found


def tokens_of(batch: Batch) -> Tokens:
    lengths = [int(rollout.mask.sum()) for rollout in batch.rollouts]
    spread = torch.tensor(lengths)
    filled = sum(length > 0 for length in lengths)
    per_sequence = torch.tensor([1 / (filled * length) if length else 0.0 for length in lengths])
    targets = [torch.from_numpy(r.response_ids)[torch.from_numpy(r.mask) > 0] for r in batch.rollouts]
    return Tokens(
        target=torch.cat(targets),
        advantage=torch.tensor(batch.advantages, dtype=torch.float64).repeat_interleave(spread),
        token_mean=torch.full((sum(lengths),), 1 / sum(lengths), dtype=torch.float64),
        sequence_mean=per_sequence.double().repeat_interleave(spread),
    )


def _support(read: Read, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """All ids [N, V] in order of value, and which are kept: the shortest prefix of at most K with mass
    1 - DELTA, and the sampled token."""
    ids = read.logits.detach().argsort(1, descending=True)
    mass = read.logits.detach().softmax(1).gather(1, ids)
    prefix = mass.cumsum(1) - mass < 1 - DELTA
    prefix[:, K:] = False
    return ids, prefix | (ids == tokens.target[:, None])
