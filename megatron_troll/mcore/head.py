"""The LM head: from final hidden states to the inputs of an objective, under vocabulary parallelism.

Gradients take one of two paths. Logits at the ids of a top-K record need only K columns, forward and
backward, and are exact for methods on renormalised supports (ALGORITHMS 1.7). Quantities of the full softmax
use chunks of whole rows, which backward recomputes. Neither path holds N x V.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from troll_kernels import sparsify

from megatron_troll.mcore.head_kl import full_kl
from megatron_troll.mcore.head_shard import HeadShard, Rows, reporting, shard_of
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.parallel import vocab
from megatron_troll.types import HeadOutputs, HeadRequest, Probe, Support, TopK


@dataclass(frozen=True)
class Head:
    """The head of a model's last stage. `temperature` divides the logits after the model's soft-cap, as in
    the sampler. `chunk`: tokens whose logits are held at once; the default depends on the device."""

    model: MegatronModel
    temperature: float = 1.0
    chunk: int | None = None

    @property
    def shard(self) -> HeadShard:
        return shard_of(self.model, self.temperature, self.chunk)

    def entered(self, hidden: Tensor) -> Tensor:
        """Cast `hidden` to the head's dtype: Megatron's bf16 wrapper outputs fp32 on the last stage."""
        return hidden.to(self.model.stages[-1].output_weight.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, h] -> this rank's shard of the logits [N, V_padded / tp] in fp32, for few positions."""
        shard = self.shard
        return shard.transform.apply(F.linear(self.entered(hidden), shard.weight).float())

    def read(
        self, hidden: Tensor, target: Tensor, reads: HeadRequest, beside: "HeadContext | None" = None
    ) -> HeadOutputs:
        """Compute everything that `reads` requests for hidden states [N, h] and sampled tokens [N]; every
        tensor-parallel rank returns the same. Holds a chunk of logits and N x K numbers for each record.

        Whole rows are computed only if needed: `support: old` by itself gives no entropy and no logsumexp.
        """
        return self.outputs(self.scan(hidden, target, reads), reads, beside)

    def scan(self, hidden: Tensor, target: Tensor, *requests: HeadRequest) -> "Scan":
        """Compute the whole rows that `requests` need, once for all of them; arguments as in `read`. Only the
        first is differentiated, and only if gradients are enabled."""
        hidden = self.entered(reporting(hidden, self.model))
        backward = requests[0].full_softmax and torch.is_grad_enabled()
        rows = self.shard.rows(hidden, target) if backward else None
        own = [kept for each in requests for kept in each.own]
        chosen = None
        if own or (rows is None and any(_whole_rows(each) for each in requests)):
            k = max((kept.k for kept in own), default=0)
            chosen = Selection(*self.shard.selection(hidden, target, k))
        return Scan(hidden, target, rows or (chosen.rows if chosen else None), chosen)

    def outputs(self, scan: "Scan", reads: HeadRequest, beside: "HeadContext | None" = None) -> HeadOutputs:
        """Compute what `read` returns from a scan that `reads` was among the requests of."""
        hidden, target, chosen, beside = scan.hidden, scan.target, scan.chosen, beside or HeadContext()
        rows = scan.rows if _whole_rows(reads) else None
        lse = None if rows is None else rows.lse if reads.full else rows.lse.detach()
        records = {
            kept: self._record(hidden, target, kept, lse, chosen, beside.old) for kept in reads.supports
        }
        return HeadOutputs(
            logp=rows.logp if rows is not None and reads.logp else None,
            topk=None if reads.topk is None else records[reads.topk],
            entropy=None if rows is None else rows.entropy if reads.entropy else rows.entropy.detach(),
            at_rollout=self._at_rollout(hidden, lse, beside.rollout) if reads.at_rollout else None,
            reference_kl=self._kl(hidden, lse, beside.frozen) if reads.reference_kl else None,
            collision=self._collision(hidden, target, lse) if reads.collision else None,
            others={kept: records[kept] for kept in reads.others},
        )

    @torch.no_grad()
    def probe(self, hidden: Tensor, rows: Tensor) -> Probe:
        """Full log-probabilities of hidden[rows]. Holds M x V / tp."""
        return Probe(rows, self.log_probs(hidden[rows]))

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-prob rows: this rank's shard [N, V_padded / tp], -inf on padding, for few positions."""
        return vocab.log_softmax(self.logits(hidden), self.model.groups.tp, self.model.shape.vocab)

    @torch.no_grad()
    def freeze(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, "Frozen"]:
        """Return the log-probs of the sampled tokens [N], and the data to read the same positions again."""
        hidden = self.entered(hidden)
        rows, _, _ = self.shard.selection(hidden, target, 0)
        return rows.logp, Frozen(self, hidden, rows.lse)

    def _at_rollout(self, hidden: Tensor, lse: Tensor | None, record: TopK | None) -> Tensor:
        """Log-probabilities [N, W] at the ids of `record`, -inf on its unused slots."""
        if record is None:
            raise ValueError("the objective reads the rollout engine's top-K, and the rollouts have none")
        assert lse is not None
        with torch.no_grad():
            logits = self.shard.logits_at(hidden, record.ids)
            return (logits - lse[:, None]).to(logits.dtype)

    def _kl(self, hidden: Tensor, lse: Tensor | None, frozen: "Frozen | None") -> Tensor:
        if frozen is None:
            raise ValueError(
                "the objective reads a reference model, and none was given: set models.reference"
            )
        assert lse is not None
        return full_kl(self.shard, hidden, lse, frozen.head.shard, frozen.hidden, frozen.lse)

    @torch.no_grad()
    def _collision(self, hidden: Tensor, target: Tensor, lse: Tensor | None) -> Tensor:
        """sum_v p_v^2 [N], from the logsumexp of twice the logits, that is, at half the temperature."""
        assert lse is not None
        twice, _, _ = replace(self, temperature=self.temperature / 2).shard.selection(hidden, target, 0)
        return (twice.lse - 2 * lse).exp().to(twice.target.dtype)

    def _record(
        self,
        hidden: Tensor,
        target: Tensor,
        support: Support,
        lse: Tensor | None,
        chosen: "Selection | None",
        old: HeadOutputs | None,
    ) -> TopK:
        if support.kind == "old":
            kept = record_of(old, support)
            ids, count, place = kept.ids, kept.count, kept.place
        else:
            assert chosen is not None
            ids, count, place = chosen.support(target, support)
        return TopK(ids, self.shard.logits_at(hidden, ids), count, place, lse, self.model.shape.vocab)


def _whole_rows(reads: HeadRequest) -> bool:
    return bool(reads.own) or reads.full_softmax or reads.at_rollout


@dataclass(frozen=True)
class Scan:
    """Results from whole rows of N positions: hidden [N, h] in the head's dtype and target [N]; rows, if
    something needs them, with gradient if something is differentiated through them; chosen: the candidates
    for records that choose their own ids."""

    hidden: Tensor
    target: Tensor
    rows: Rows | None
    chosen: "Selection | None"

    def detach(self) -> "Scan":
        rows = self.rows and Rows(*(column.detach() for column in vars(self.rows).values()))
        return replace(self, hidden=self.hidden.detach(), rows=rows)


@dataclass(frozen=True)
class Selection:
    """Candidates of N positions, without gradient: values and ids [N, K], value descending, then id
    ascending."""

    rows: Rows
    values: Tensor
    ids: Tensor

    def support(self, target: Tensor, support: Support) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [N, W], count [N] and place [N] of the tokens that `support` keeps."""
        values, ids = self.values[:, : support.k], self.ids[:, : support.k]
        found = sparsify.select(values, ids, self.rows.lse, target, self.rows.target, support.delta)
        return found[0], found[2], found[3]


@dataclass(frozen=True)
class Frozen:
    """Saved results of a frozen model's forward over N positions: its final hidden states [N, h] and the
    logsumexp [N] of its head, float64."""

    head: Head
    hidden: Tensor
    lse: Tensor

    @torch.no_grad()
    def at(self, record: TopK) -> TopK:
        """This head's logits at the ids of another policy's `record`, for the same N positions."""
        return replace(record, logits=self.head.shard.logits_at(self.hidden, record.ids), lse=self.lse)


@dataclass(frozen=True)
class HeadContext:
    """Earlier results for the same N positions: of the old policy, the rollout engine, and a frozen reference
    model."""

    old: HeadOutputs | None = None
    rollout: TopK | None = None
    frozen: Frozen | None = None


def record_of(old: HeadOutputs | None, support: Support) -> TopK:
    """The old policy's record whose ids `support: old` uses: the one made for exactly this support or, if
    there is none, its top-K record."""
    kept = None if old is None else old.others.get(replace(support, kind="own"), old.topk)
    if kept is None:
        raise ValueError("support: old reads the old policy's top-K record, and none was given")
    return kept
