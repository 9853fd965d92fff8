"""The LM head: from final hidden states to what an objective reads, under vocabulary parallelism."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from troll_kernels import sparsify

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.parallel import vocab
from megatron_troll.types import Probe, Readings, Reads, Support, TopK


@dataclass(frozen=True)
class Records:
    """Whose ids the head is read at: the old policy's record for `support: old`, the rollout engine's."""

    old: TopK | None = None
    rollout: TopK | None = None


NO_RECORDS = Records()


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

    def read(self, hidden: Tensor, target: Tensor, reads: Reads, records: Records = NO_RECORDS) -> Readings:
        """Everything `reads` names, for N hidden states [N, h] and sampled tokens [N]; every
        tensor-parallel rank returns the same. Holds N x V / tp logits in fp32; with gradient, until the
        backward. Each rank sends N x K candidates."""
        tp, size = self.model.groups.tp, self.model.shape.vocab
        logits = self.logits(hidden)
        lse = vocab.logsumexp(logits if reads.full else logits.detach(), tp, size)
        topk = None if reads.topk is None else self._support(logits, target, lse, reads.topk, records.old)
        entropy = vocab.entropy(logits if reads.entropy else logits.detach(), lse.detach(), tp, size)
        return Readings(
            logp=vocab.log_prob(logits, target, tp, size) if reads.logp else None,
            topk=topk,
            entropy=entropy,
            at_rollout=self._at(logits.detach(), lse.detach(), records.rollout) if reads.at_rollout else None,
        )

    def _at(self, logits: Tensor, lse: Tensor, record: TopK | None) -> Tensor:
        """Log-probabilities [N, W] at the ids of `record`, -inf on its unused slots."""
        if record is None:
            raise ValueError("the objective reads the rollout engine's top-K, and the rollouts have none")
        return vocab.gather_logits(logits, record.ids, self.model.groups.tp) - lse[:, None]

    @torch.no_grad()
    def probe(self, hidden: Tensor, rows: Tensor) -> Probe:
        """Full log-probabilities of hidden[rows]. Holds M x V / tp."""
        tp, size = self.model.groups.tp, self.model.shape.vocab
        return Probe(rows, vocab.log_softmax(self.logits(hidden[rows]), tp, size))

    def _support(
        self, logits: Tensor, target: Tensor, lse: Tensor, support: Support, old: TopK | None
    ) -> TopK:
        tp, size = self.model.groups.tp, self.model.shape.vocab
        if support.kind == "old":
            assert old is not None
            ids, count, place = old.ids, old.count, old.place
        else:
            with torch.no_grad():
                target_logit = vocab.gather_logits(logits, target[:, None], tp)[:, 0]
                values, candidates = vocab.topk(logits, support.k, tp, size)
                ids, _, count, place = sparsify.select(
                    values, candidates, lse.detach(), target, target_logit, support.delta
                )
        return TopK(ids, vocab.gather_logits(logits, ids, tp), count, place, lse, size)
