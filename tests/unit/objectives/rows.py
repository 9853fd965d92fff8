"""Several responses with full rows of logits behind every token, read as the LM head would read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_troll.objectives import Objective
from megatron_troll.objectives.slots import Statistics
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs, Segments, Support, TopK
from tests.unit.golden.records import sampled_logp, topk_record


@dataclass(frozen=True)
class Rows:
    """N tokens of S responses, in order. Logits [N, V] of the current, old, rollout and reference policy;
    target, weight, uniform [N]; owner [N] each token's response, an empty response owns none; advantage,
    group [S]; rollout [S] index in a rollout batch of `rollouts`."""

    new: Tensor
    old: Tensor
    mu: Tensor
    reference: Tensor
    target: Tensor
    weight: Tensor
    uniform: Tensor
    owner: Tensor
    advantage: Tensor
    group: Tensor
    rollout: Tensor
    rollouts: int

    def only(self, responses: Sequence[int]) -> "Rows":
        """The micro-batch of these responses."""
        rows = [i for r in responses for i in (self.owner == r).nonzero()[:, 0].tolist()]
        owner = [k for k, r in enumerate(responses) for _ in range(int((self.owner == r).sum()))]
        tokens = ("new", "old", "mu", "reference", "target", "weight", "uniform")
        each = ("advantage", "group", "rollout")
        return replace(
            self,
            owner=torch.tensor(owner, dtype=torch.int64),
            **{name: getattr(self, name)[rows] for name in tokens},
            **{name: getattr(self, name)[list(responses)] for name in each},
        )

    def inputs(self, objective: Objective, rollout_k: int = 20) -> ObjectiveInputs:
        """What `objective` reads of them. The rollout engine kept the top `rollout_k`."""
        nothing = HeadOutputs(None, None, None)
        engine = topk_record(self.mu.log_softmax(1), self.target, rollout_k, 0.0)
        old = objective.prepare_old(read(self.old, self.target, objective.reads_old, nothing, engine))
        new = read(self.new, self.target, objective.reads, old, engine, self.reference)
        position = torch.cat([torch.arange(int((self.owner == r).sum())) for r in range(len(self.group))])
        return ObjectiveInputs(
            new=new,
            old=old,
            rollout_logp=sampled_logp(self.mu, self.target),
            rollout_topk=engine,
            advantage=self.advantage[self.owner],
            weight=self.weight,
            position=position,
            segments=segments(self.owner, len(self.group)),
            group=self.group,
            rollout=self.rollout,
            rollouts=self.rollouts,
            uniform=self.uniform,
            reference=self._reference(objective, new),
            aggregation="token-mean",
            response_advantage=self.advantage,
        )

    def _reference(self, objective: Objective, new: HeadOutputs) -> HeadOutputs:
        def at(record: TopK) -> TopK:
            return at_record(self.reference, record)

        topk = None if new.topk is None else at(new.topk)
        others = {support: at(record) for support, record in new.others.items()}
        return HeadOutputs(sampled_logp(self.reference, self.target), topk, None, others=others)


def sample(
    lengths: Sequence[int], vocab: int = 24, change: float = 0.5, seed: int = 0, group: int = 2
) -> Rows:
    """Random policies around one another, float64; responses of one prompt side by side, `group` each, with
    centred advantages. Tokens are drawn from the rollout policy."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    n, responses = sum(lengths), len(lengths)
    mu = 2 * normal(n, vocab)
    old = mu + 0.1 * normal(n, vocab)
    advantage = normal(responses).view(-1, group)
    return Rows(
        new=(old + change * normal(n, vocab)).requires_grad_(),
        old=old,
        mu=mu,
        reference=old + normal(n, vocab),
        target=torch.multinomial(mu.softmax(1), 1, generator=generator)[:, 0],
        weight=torch.full((n,), 1.0 / max(n, 1), dtype=torch.float64),
        uniform=torch.rand(n, generator=generator, dtype=torch.float64),
        owner=torch.arange(responses).repeat_interleave(torch.tensor(lengths)),
        advantage=(advantage - advantage.mean(1, keepdim=True)).flatten(),
        group=torch.arange(responses) // group,
        rollout=torch.arange(responses) + 1,
        rollouts=responses + 2,
    )


def read(
    logits: Tensor,
    target: Tensor,
    reads: HeadRequest,
    old: HeadOutputs,
    engine: TopK,
    reference: Tensor | None = None,
) -> HeadOutputs:
    """The dense twin of the head."""
    logp = logits.log_softmax(1)
    at_rollout = logp.detach().gather(1, engine.ids.clamp(min=0))
    full_kl = None
    if reads.reference_kl:
        assert reference is not None
        full_kl = (logp.exp() * (logp - reference.log_softmax(1))).sum(1)

    def record(support: Support) -> TopK:
        if support.kind == "own":
            found = topk_record(logits, target, support.k, support.delta)
        else:
            kept = Support("own", support.k, support.delta)
            source = old.others.get(kept, old.topk)
            assert source is not None
            found = at_record(logits, source)
        assert found.lse is not None
        return found if reads.full else replace(found, lse=found.lse.detach())

    return HeadOutputs(
        logp=logp.gather(1, target[:, None])[:, 0] if reads.logp else None,
        topk=None if reads.topk is None else record(reads.topk),
        entropy=-(logp.exp() * logp).sum(1) if reads.entropy else None,
        at_rollout=torch.where(engine.valid, at_rollout, float("-inf")) if reads.at_rollout else None,
        reference_kl=full_kl,
        others={support: record(support) for support in reads.others},
    )


def at_record(logits: Tensor, record: TopK) -> TopK:
    """`logits` [N, V] at the ids of `record`, with their logsumexp."""
    kept = torch.where(record.valid, logits.gather(1, record.ids.clamp(min=0)), float("-inf"))
    return replace(record, logits=kept, lse=logits.logsumexp(1))


def segments(owner: Tensor, responses: int) -> Segments:
    return Segments(
        sum=lambda x: x.new_zeros(responses).index_add(0, owner, x),
        expand=lambda x: x[owner],
        whole=lambda x: x.detach(),
        mine=lambda x: x.detach(),
        owner=owner,
    )


def statistics_of(objective: Objective, parts: Sequence[ObjectiveInputs]) -> Statistics | None:
    """The statistics of a step of several micro-batches, added up as the loop does."""
    sums = [objective.statistics(part) for part in parts]
    if sums[0] is None:
        return None
    return {name: torch.stack([s[name] for s in sums if s is not None]).sum(0) for name in sums[0]}


def slope(value: Callable[[Tensor], Tensor], logits: Tensor, step: float = 1e-5) -> Tensor:
    """d value / d logits by central differences."""
    flat = logits.detach().flatten()
    found = torch.empty_like(flat)
    for i in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * step
            ends.append(value(moved.view_as(logits)))
        found[i] = (ends[0] - ends[1]) / (2 * step)
    return found.view_as(logits)


def gradient(objective: Objective, rows: Rows) -> Tensor:
    """dJ / d new logits of one micro-batch."""
    inputs = rows.inputs(objective)
    loss = objective.loss(inputs, statistics_of(objective, [inputs])).loss
    return -torch.autograd.grad(loss, rows.new)[0]
