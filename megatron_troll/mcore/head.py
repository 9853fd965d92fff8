"""The LM head: from final hidden states to what an objective reads, under vocabulary parallelism."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.parallel import vocab
from megatron_troll.parallel.records import own_record
from megatron_troll.types import Probe, Readings, Reads, Support, TopK


@dataclass(frozen=True)
class Head:
    """The head of a model's last stage. `temperature` divides the logits, as it did in the sampler."""

    model: MegatronModel
    temperature: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, h] -> this rank's shard [N, V_padded / tp] in fp32."""
        weight = self.model.stages[-1].output_weight
        # Megatron's bf16 wrapper gives the last stage's output in fp32.
        return F.linear(hidden.to(weight.dtype), weight).float() / self.temperature

    def read(self, hidden: Tensor, target: Tensor, reads: Reads, beside: "Beside | None" = None) -> Readings:
        """Everything `reads` names, for N hidden states [N, h] and sampled tokens [N]; every
        tensor-parallel rank returns the same. Holds N x V / tp logits in fp32; with gradient, until the
        backward. Each rank sends N x K candidates."""
        tp, size, beside = self.model.groups.tp, self.model.shape.vocab, beside or Beside()
        logits = self.logits(hidden)
        lse = vocab.logsumexp(logits if reads.full else logits.detach(), tp, size)
        records = {kept: self._record(logits, target, lse, kept, beside.old) for kept in reads.supports}
        entropy = vocab.entropy(logits if reads.entropy else logits.detach(), lse.detach(), tp, size)
        return Readings(
            logp=vocab.log_prob(logits, target, tp, size) if reads.logp else None,
            topk=None if reads.topk is None else records[reads.topk],
            entropy=entropy,
            at_rollout=self._at(logits.detach(), lse.detach(), beside.rollout) if reads.at_rollout else None,
            reference_kl=self._kl(logits, lse, beside.frozen) if reads.reference_kl else None,
            collision=vocab.collision(logits, lse, tp, size) if reads.collision else None,
            others={kept: records[kept] for kept in reads.others},
        )

    @torch.no_grad()
    def probe(self, hidden: Tensor, rows: Tensor) -> Probe:
        """Full log-probabilities of hidden[rows]. Holds M x V / tp."""
        return Probe(rows, self.log_probs(hidden[rows]))

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """This rank's shard [N, V_padded / tp] of the full rows, -inf on padding."""
        return vocab.log_softmax(self.logits(hidden), self.model.groups.tp, self.model.shape.vocab)

    @torch.no_grad()
    def at(self, hidden: Tensor, lse: Tensor, record: TopK) -> TopK:
        """This head's logits at the ids of another policy's `record`, for the same N positions; `lse` [N] is
        this head's own. Holds N x V / tp."""
        logits = vocab.gather_logits(self.logits(hidden), record.ids, self.model.groups.tp)
        return replace(record, logits=logits, lse=lse)

    def _at(self, logits: Tensor, lse: Tensor, record: TopK | None) -> Tensor:
        """Log-probabilities [N, W] at the ids of `record`, -inf on its unused slots."""
        if record is None:
            raise ValueError("the objective reads the rollout engine's top-K, and the rollouts have none")
        return vocab.gather_logits(logits, record.ids, self.model.groups.tp) - lse[:, None]

    def _kl(self, logits: Tensor, lse: Tensor, frozen: "Frozen | None") -> Tensor:
        if frozen is None:
            raise ValueError(
                "the objective reads a reference model, and none was given: set models.reference"
            )
        reference = frozen.head.log_probs(frozen.hidden)
        return vocab.kl(logits, lse, reference, self.model.groups.tp, self.model.shape.vocab)

    def _record(
        self, logits: Tensor, target: Tensor, lse: Tensor, support: Support, old: Readings | None
    ) -> TopK:
        tp, size = self.model.groups.tp, self.model.shape.vocab
        if support.kind == "own":
            return own_record(logits, target, lse, support, tp, size)
        kept = record_of(old, support)
        at_kept = vocab.gather_logits(logits, kept.ids, tp)
        return TopK(kept.ids, at_kept, kept.count, kept.place, lse, size)


@dataclass(frozen=True)
class Frozen:
    """What is kept of a frozen model's forward over N positions: its final hidden states [N, h] and the
    logsumexp [N] of its head."""

    head: Head
    hidden: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Beside:
    """What was read of the same N positions before: of the old policy, by the rollout engine, of a frozen
    reference model."""

    old: Readings | None = None
    rollout: TopK | None = None
    frozen: Frozen | None = None


def record_of(old: Readings | None, support: Support) -> TopK:
    """The old policy's record whose ids `support: old` names: the one cut for just this support, or its only
    one."""
    kept = None if old is None else old.others.get(replace(support, kind="own"), old.topk)
    if kept is None:
        raise ValueError("support: old reads the old policy's top-K record, and none was given")
    return kept
