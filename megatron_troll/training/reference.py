"""The frozen reference model: one forward pass per rollout batch, read again at each update."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_troll.batching.held import with_experts
from megatron_troll.config import Model
from megatron_troll.mcore.head import Frozen, Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.schedule import infer
from megatron_troll.types import HeadOutputs, HeadRequest, MicroBatch, Support, TopK
from megatron_troll.weights.load import load
from megatron_troll.weights.source import open_checked


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs kept for one micro-batch: logp [N] of the sampled tokens; frozen: the hidden states [N, h] in
    the model's dtype on the last stage's device, if logits are computed from them again, otherwise None."""

    logp: Tensor
    frozen: Frozen | None


@dataclass(frozen=True)
class Reference:
    """The reference under the policy's layout, so that both have the same micro-batches: only then can each
    update read it at ids that the new policy chooses."""

    model: MegatronModel
    head: Head
    reads: HeadRequest

    def keep(self, batches: Sequence[MicroBatch]) -> list[ReferenceOutputs]:
        """Run one forward pass of the micro-batches; outputs on the last stage, [] elsewhere. Blocks on every
        rank."""
        again = bool(self.reads.supports) or self.reads.reference_kl
        # Replayed experts are the policy's: the reference uses its own routers.
        own = with_experts(batches, [None] * len(batches))

        def read(i: int, hidden: Tensor) -> ReferenceOutputs:
            logp, frozen = self.head.freeze(hidden, own[i].target)
            return ReferenceOutputs(logp, frozen if again else None)

        return infer(self.model, own, read)

    def beside(self, kept: ReferenceOutputs, new: HeadOutputs, reads: HeadRequest) -> HeadOutputs:
        """The reference's readings that correspond to the new policy's `reads`: log-probs, and records at the
        same ids."""
        if not self.reads.supports:
            return HeadOutputs(kept.logp, None, None)
        frozen = kept.frozen
        assert frozen is not None
        records: dict[Support, TopK] = {}
        for support in self.reads.supports:
            record = new.topk if support == reads.topk else new.others[support]
            assert record is not None
            records[support] = frozen.at(record)
        first = None if reads.topk is None else records.get(reads.topk)
        return HeadOutputs(kept.logp, first, None, others=records)


def open_reference(
    model: Model, policy: MegatronModel, temperature: float, reads: HeadRequest, head_chunk: int | None = None
) -> Reference:
    """The reference with the weights of `model`'s folder, in the shape and layout of `policy`, without
    gradient buffers or optimizer. temperature and head_chunk: see Head. Blocks on every rank."""
    built = build(model, policy.shape, policy.groups, trained=False, progress=policy.progress)
    load(built, open_checked(model.path, policy.shape, policy.groups.world))
    for chunk in built.chunks:
        chunk.requires_grad_(False)
    built.train(False)
    return Reference(built, Head(built, temperature, head_chunk), reads)
