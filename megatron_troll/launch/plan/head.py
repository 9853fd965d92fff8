"""Bytes that the LM head holds on the last stage, for every mode of its gradient (mcore/head.py)."""

from dataclasses import asdict, dataclass

from troll_kernels.head.shard import GPU_CHUNK

from megatron_troll.config import RolloutModelConfig
from megatron_troll.launch.plan.saved.flow import FLOAT, INDEX, Flow
from megatron_troll.objectives.objective import Objective
from megatron_troll.types import HeadRequest

STATISTICS = 3 * FLOAT  # logsumexp, entropy, logit of the sampled token
SHORT = INDEX + FLOAT  # an id and its logit


@dataclass(frozen=True)
class Logits:
    """Bytes of logits for one micro-batch in which every token carries loss.

    whole     all logits at once, which plain PyTorch would hold and no mode does
    dense     a chunk of whole rows, for methods that differentiate the full softmax
    own       a chunk of whole rows, and the record of the kept columns
    old       only the record: `support: old`
    used      the value of this objective's mode
    mode      this objective's mode: dense, own or old
    """

    whole: int
    dense: int
    own: int
    old: int
    used: int
    mode: str

    def by_mode(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name not in ("used", "mode")}


def logits_of(flow: Flow, objective: Objective, chunk: int | None = None) -> Logits:
    """Bytes in every mode. chunk: `train.head_chunk`; None: the default of a GPU."""
    rows = flow.shape.padded_vocab(flow.model.layout.tp) // flow.model.layout.tp
    held = flow.width * min(chunk or GPU_CHUNK, flow.tokens) * rows
    record = flow.tokens * SHORT * max(1, _kept(objective.reads))
    statistics = flow.tokens * STATISTICS
    modes = {"dense": held + statistics, "own": held + statistics + record, "old": record}
    mode = _mode(objective.reads)
    return Logits(FLOAT * flow.tokens * rows, **modes, used=modes[mode], mode=mode)


def saved_by_head(flow: Flow, objective: Objective) -> int:
    """Bytes of the hidden states at the tokens that carry loss, and of the numbers of every record."""
    hidden = flow.hidden(flow.tokens)
    return hidden + flow.tokens * (STATISTICS + SHORT * _kept(objective.reads))


def records_of(tokens: int, flow: Flow, objective: Objective, drawing: RolloutModelConfig | None) -> int:
    """Bytes kept for `tokens` tokens from before the update until the rollout batch is done: readings of the
    old policy and of the reference model, with its hidden states if its head is read again, and of the policy
    for a rollout model, which is trained after the policy."""
    kept = tokens * (STATISTICS + SHORT * _kept(objective.reads_old))
    if objective.needs_reference:
        again = bool(objective.reads_reference.supports) or objective.reads_reference.reference_kl
        kept += tokens * FLOAT * 2 + (flow.hidden(tokens) if again else 0)
    if drawing is not None:
        kept += tokens * SHORT * (drawing.distill.k + 2)
    return kept


def _kept(reads: HeadRequest) -> int:
    """Columns of all records together: of each, the K kept tokens and the sampled one."""
    return sum(support.k + 1 for support in reads.supports)


def _mode(reads: HeadRequest) -> str:
    if reads.full_softmax:
        return "dense"
    return "own" if reads.own else "old"
