"""Records that pass between packages. Docstrings give the shapes; N is the number of tokens with loss."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
NO_ID = -1


@dataclass(frozen=True)
class Message:
    """One chat turn. `train`: whether its tokens carry loss; only assistant turns may."""

    role: str
    content: str
    train: bool = False


@dataclass(frozen=True)
class Prompt:
    """A task: the chat so far, its answer, and whatever else its record holds (given to the reward).

    ids  int32 [P] tokens of the chat up to the start of the assistant's answer; empty before data/chat.py
         has tokenized it
    opens_reasoning  whether the rendered chat ends with <think>, so that the answer begins inside reasoning
    source  the name of the data source that it comes from; "" if the run has only one, without a name
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    record: dict[str, Any] = field(default_factory=dict)
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32), compare=False, repr=False)
    opens_reasoning: bool = field(default=False, compare=False)
    source: str = field(default="", compare=False)

    @cached_property
    def text_key(self) -> str:
        """32 hex digits that depend only on the roles and texts of the chat."""
        text = json.dumps([(message.role, message.content) for message in self.messages])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class TokenTopK:
    """Top-K of one response on the host, as the rollout engine or a file gives it.

    ids     [T, K] int32, value descending then id ascending; NO_ID pads rows that keep fewer
    logp    [T, K] float32 log-probs of the sampling distribution (after temperature), -inf on padding
    """

    ids: np.ndarray
    logp: np.ndarray


@dataclass(frozen=True)
class Rollout:
    """One sampled response. T counts response tokens, the stop token included: 12 bytes each, as on disk.

    prompt_ids, response_ids   int32 [P], [T]
    marks      int32 [T], `mask` and `versions` in one number (`marked`)
    logp       float32 [T], engine log-probability of each sampled token, after temperature
    key        64 bits from which one random number in [0, 1) per token follows (`batching.uniforms`), for
               methods that use it later (Jackpot)
    temperature  divisor of the logits in logp and topk, before filters; the trainer divides by the same
    group      index of the prompt in its rollout batch; sample: index among the samples of that prompt
    experts    uint8 or uint16 [P + T - 1, layers, k], ascending: the experts to which the engine's model
               sent each token it read (it did not read the last sampled one); None: not recorded
    elsewhere  topk and experts are None here and on rank 0, until this rank asks for them
               (rollout/records.py)
    """

    prompt: Prompt
    group: int
    sample: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    marks: np.ndarray
    logp: np.ndarray
    key: int
    topk: TokenTopK | None
    text: str
    finish: FinishReason
    temperature: float
    experts: np.ndarray | None = None
    elsewhere: bool = False

    @property
    def name(self) -> str:
        """Name of this sample in errors and reports."""
        return f"{self.prompt.id}#{self.sample}"

    @property
    def mask(self) -> np.ndarray:
        """bool [T], whether the token was sampled by the policy and carries loss."""
        return (self.marks & 1).astype(bool)

    @property
    def versions(self) -> np.ndarray:
        """int32 [T], of the weights that sampled each token: rollout batches they had been trained on."""
        return self.marks >> 1

    def masked(self) -> "Rollout":
        """The same response, without a token that carries loss."""
        return replace(self, marks=self.marks & ~1)


def marked(mask: np.ndarray, versions: np.ndarray) -> np.ndarray:
    """`Rollout.marks` of mask [T], above 0 where a token carries loss, and versions [T] from 0 to 2^30."""
    return (versions.astype(np.int32) << 1) | (mask > 0)


@dataclass(frozen=True)
class TopK:
    """Sparse token distributions of N positions: the record every method reads.

    The first `count` slots of a row are kept tokens: the top-K prefix (value descending, id ascending),
    then the sampled token if the prefix lacks it. W = K + 1.

    ids     [N, W] int64, NO_ID on unused slots
    logits  [N, W] float32 or better, after temperature; -inf on unused slots. May require grad.
    count   [N] int64
    place   [N] int64, slot of the sampled token; NO_ID if its logit is -inf and it has no slot
    lse     [N] float64, logsumexp over the full vocabulary of the same logits, so that logits - lse are
            log-probabilities; None if the full row was never computed (`support: old`)
    vocab   number of tokens V, padded rows excluded
    """

    ids: Tensor
    logits: Tensor
    count: Tensor
    place: Tensor
    lse: Tensor | None
    vocab: int

    @property
    def valid(self) -> Tensor:
        """[N, W] bool, True on kept slots."""
        slots = torch.arange(self.ids.shape[1], device=self.ids.device)
        return slots < self.count[:, None]

    def detach(self) -> "TopK":
        lse = None if self.lse is None else self.lse.detach()
        return TopK(self.ids, self.logits.detach(), self.count, self.place, lse, self.vocab)


@dataclass(frozen=True)
class Support:
    """The token ids that a top-K read keeps. `own`: the k largest logits, cut at mass 1 - delta, plus the
    sampled token (ALGORITHMS 1.1); `old`: the ids of the old policy's record."""

    kind: Literal["own", "old"]
    k: int
    delta: float


@dataclass(frozen=True)
class HeadRequest:
    """The readings that an objective needs from the LM head.

    logp          full-softmax log-prob of the sampled token, with gradient
    topk          a sparse record, with gradient of its logits
    full          the record's lse with gradient too, so that logits - lse are differentiable log-probs
    at_rollout    log-probs at the ids of the rollout engine's record, without gradient
    entropy       entropy over the full vocabulary, with gradient
    reference_kl  KL(policy || reference) over the full vocabulary, with gradient
    collision     sum of squared probabilities over the full vocabulary, without gradient
    others        more records like `topk`, if the methods of one objective keep different ids
    """

    logp: bool = False
    topk: Support | None = None
    full: bool = False
    at_rollout: bool = False
    entropy: bool = False
    reference_kl: bool = False
    collision: bool = False
    others: tuple[Support, ...] = ()

    @property
    def supports(self) -> tuple[Support, ...]:
        """Every record that is read."""
        return (() if self.topk is None else (self.topk,)) + self.others

    @property
    def own(self) -> tuple[Support, ...]:
        """The records whose ids are chosen from the whole row."""
        return tuple(kept for kept in self.supports if kept.kind == "own")

    @property
    def full_softmax(self) -> bool:
        """Whether something is differentiated through the whole row."""
        return self.logp or self.full or self.entropy or self.reference_kl


@dataclass(frozen=True)
class Probe:
    """Full rows at a few of the N positions, for what a sparse record cannot show.

    rows   [M] int64, indices into the N positions
    logp   [M, V / tp] full-softmax log-probabilities, this rank's shard of the vocabulary
    """

    rows: Tensor
    logp: Tensor


@dataclass(frozen=True)
class HeadOutputs:
    """Readings of the LM head for N positions; None if not requested or never computed.

    logp [N]; topk; entropy [N] nats, with gradient only if `HeadRequest.entropy` asked for it; probe;
    at_rollout [N, W] detached full-softmax log-probs at the ids of `ObjectiveInputs.rollout_topk`, -inf on
    its unused slots; reference_kl [N] nats; collision [N] detached; others: the records that
    `HeadRequest.others` asked for, by support.
    """

    logp: Tensor | None
    topk: TopK | None
    entropy: Tensor | None
    probe: Probe | None = None
    at_rollout: Tensor | None = None
    reference_kl: Tensor | None = None
    collision: Tensor | None = None
    others: Mapping[Support, TopK] = field(default_factory=dict)


@dataclass(frozen=True)
class Segments:
    """Reductions over the tokens of one response, which may lie on several context-parallel ranks.

    sum     [N] -> [S], total per response over every rank (differentiable)
    expand  [S] -> [N]
    whole   [N] -> [L], the values of every token of the S responses, response by response in order of
            position, on every rank (not differentiable)
    mine    [L] -> [N], back to this rank's tokens
    owner   [L] int64, index of the response that each token of `whole` belongs to
    """

    sum: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor], Tensor]
    whole: Callable[[Tensor], Tensor]
    mine: Callable[[Tensor], Tensor]
    owner: Tensor


@dataclass(frozen=True)
class ObjectiveInputs:
    """Everything an objective may read, for N tokens of one micro-batch on one rank.

    new          differentiable readings of the current policy
    old          readings of the policy at the start of the update, detached
    rollout_logp [N] log-prob of the sampled token under the rollout engine
    rollout_topk the engine's own record, if it was kept
    advantage    [N] detached
    weight       [N] aggregation weight of each token, normalised by sums over the whole optimizer step (every
                 micro-batch and rank). 0 masks a token.
    position     [N] index of the token inside its response, masked tokens not counted
    segments     reductions over responses
    group        [S] int64, prompt group of each response in the rollout batch
    rollout      [S] int64, index of each response in the rollout batch
    rollouts     responses in the whole rollout batch, the size of what `statistics` indexes by `rollout`
    uniform      [N] one random number in [0, 1) per token, made with the rollout
    reference    the frozen reference model: logp [N], and topk at the ids of `new.topk` if a method reads
                 both; None if no method reads it
    aggregation  how `weight` averages tokens, a name of objectives/aggregation.py; None: unknown, which
                 methods that must know refuse
    response_advantage  [S] the advantage of each response, empty ones included; None if advantages differ
                 within a response (a critic)
    frequency    [N] share of the rollout batch's loss tokens that are the same token; None: not counted
    """

    new: HeadOutputs
    old: HeadOutputs
    rollout_logp: Tensor
    rollout_topk: TopK | None
    advantage: Tensor
    weight: Tensor
    position: Tensor
    segments: Segments
    group: Tensor
    rollout: Tensor
    rollouts: int
    uniform: Tensor
    reference: HeadOutputs | None = None
    aggregation: str | None = None
    response_advantage: Tensor | None = None
    frequency: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """The result of an objective for one micro-batch.

    loss        scalar, -sum weight * J, connected to the graph even when every weight is 0
    per_token   name -> [N] detached diagnostics, reduced over the step as `diagnostics` of the objective says
    pulls       [S] w_i A_i (objectives/asymmetry.py); None if advantages differ within a response
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    pulls: Tensor | None = None


# What a token counts for where routers count tokens: divided by 2 to 1,000 responses, still a large integer.
SHARES = 1 << 20
# Bytes of a MicroBatch: per token; in addition per token with loss; per entry of the engine's top-K.
TOKEN_BYTES, LOSS_TOKEN_BYTES, ENTRY_BYTES = 21, 52, 12


@dataclass(frozen=True)
class PackedTree:
    """Tree of packed sequences that continue one another, where prefixes are read once. A sequence comes
    before those that continue it, and those right after it (depth first).

    parent   [S] index of the sequence that each continues; -1: none
    start    [S] position of its first token
    length   [S] its tokens without padding
    """

    parent: tuple[int, ...]
    start: tuple[int, ...]
    length: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """One packed (b = 1) or padded (b sequences) forward of one data- and context-parallel rank.

    tokens, positions  [b, s] int64 on this context-parallel rank; s is a multiple of the tensor-parallel size
    padding            [b, s] bool, True on padding
    share              [b, s] int32, what each counts for where routers count tokens, in units of
                       token / SHARES: a token of a shared prefix counts once over the batch, not once for
                       each response; 0 on padding
    cu_seqlens         [S' + 1] int32 padded sequence starts over all context-parallel ranks; None: unpacked
    max_seqlen         no position is larger
    tree               how sequences continue one another; None: they do not, and each is a response
    index              [N] position in the flattened [b * s] whose hidden state predicts `target`; several
                       tokens may have the same
    target             [N] sampled token
    sequence           [N] index of the response of this micro-batch that the token belongs to
    position           [N] index inside its response, masked tokens not counted
    weight, advantage, rollout_logp   [N] float32
    rollout_topk       engine record of the same N tokens, or None
    response_advantage [S] float32, of each response; None if a critic gives each token its own
    uniform            [N] float64 in [0, 1), made with the rollout
    rollouts           [S] index of each response in the rollout batch
    groups             [S] prompt group of each response
    batch_size         responses in the whole rollout batch
    apart              tokens that the responses would read, each on its own
    frequency          [N] float32, share of the rollout batch's loss tokens that are the same token;
                       None: not counted
    experts            layer, counted from 0 -> [n, k] uint8 or uint16, for every layer with experts on this
                       rank: the experts to which its router sends its n tokens, in the rank's token order
                       (sequence parallelism included); on padding the router chooses. None: routers choose
    """

    tokens: Tensor
    positions: Tensor
    padding: Tensor
    share: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    tree: PackedTree | None
    index: Tensor
    target: Tensor
    sequence: Tensor
    position: Tensor
    weight: Tensor
    advantage: Tensor
    response_advantage: Tensor | None
    rollout_logp: Tensor
    rollout_topk: TopK | None
    uniform: Tensor
    rollouts: tuple[int, ...]
    groups: tuple[int, ...]
    batch_size: int
    apart: int
    frequency: Tensor | None = None
    experts: Mapping[int, Tensor] | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        return replace(self, **{name: _moved(value, device) for name, value in vars(self).items()})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, TopK):
        return replace(value, **{name: _moved(part, device) for name, part in vars(value).items()})
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
