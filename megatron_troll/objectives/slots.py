"""Interfaces of the methods of each slot. A method is its own configuration: a frozen pydantic model.

J_t = C_t * score_t - penalty_t - kl_t + bonus_t,   score_t = surrogate_t * A_t,   loss = -sum_t weight_t J_t

The trust region returns the policy that is used as the new one (`policy`), the ratio compares it with the
old policy, and the trust region limits that ratio (`surrogate`). All tensors are [N].
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megatron_troll.config import SlotMethod
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs

Statistics = dict[str, Tensor]
Reduction = Literal["mean", "p10", "p50", "p90", "p99", "max", "min"]
Diagnostics = Mapping[str, tuple[Reduction, ...]]
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Term:
    """A differentiable value [N] and detached diagnostics, name -> [N].

    weight  [N] of a surrogate or score: what multiplies grad log pi, clipped or not; None: the value
    """

    value: Tensor
    per_token: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


@dataclass(frozen=True)
class Policy:
    """Log-probs of the sampled tokens under the two policies that a ratio compares.

    logp     log-prob under the (possibly projected) new policy, differentiable
    old      log-prob under the old policy, detached
    penalty  subtracted from the corrected score: the correction neither weighs nor masks it
    """

    logp: Tensor
    old: Tensor
    penalty: Tensor
    per_token: dict[str, Tensor] = field(default_factory=dict)


class Method(SlotMethod):
    """A method's requests and diagnostics. By default there are none."""

    @property
    def reads(self) -> HeadRequest:
        """Readings needed of the current policy, with gradient."""
        return HeadRequest()

    @property
    def reads_old(self) -> HeadRequest:
        """Readings needed of the old policy."""
        return HeadRequest()

    @property
    def reads_reference(self) -> HeadRequest:
        """Readings needed of the reference model; its records are at the ids of `reads`."""
        return HeadRequest()

    @property
    def diagnostics(self) -> Diagnostics:
        """The per-token names that may be reported, and how to reduce them over a step. A NaN entry means
        that the token has no such value: reductions skip it."""
        return {}

    @property
    def needs_statistics(self) -> bool:
        """Whether `statistics` must run over the whole optimizer step before the first backward."""
        return False

    @property
    def rollout_k(self) -> int:
        """Entries of the rollout engine's own record that the method reads; 0: none."""
        return 0

    def statistics(self, inputs: ObjectiveInputs) -> Statistics:
        """Sums over the tokens of one micro-batch, without gradient; the loop adds them up over
        micro-batches and ranks. Names must be unique to the method."""
        return {}

    def check(self, vocab: int) -> None:
        """Raises ConfigError if the method cannot work with a vocabulary of this size."""


class TrustRegion(Method):
    """Limits how far an update moves the policy. Default: the full-softmax policy, without a limit."""

    @classmethod
    def defaults(cls, ratio: "Ratio") -> dict[str, object]:
        """Fields whose defaults depend on the ratio that is limited, by name."""
        return {}

    def remarks(self, ratio: "Ratio") -> tuple[str, ...]:
        """Notes on this method with that ratio, for the summary of a run."""
        return ()

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(logp=True)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=True)

    def prepare_old(self, old: HeadOutputs) -> HeadOutputs:
        """Check the old readings and return them as this method uses them. Called once, before any update.
        Waits for the device. Raises ValueError that names the bad positions."""
        refuse_rows(
            ~torch.isfinite(logp_of(old, "old")), "the old log-prob of the sampled token is not finite"
        )
        return old

    def policy(self, inputs: ObjectiveInputs, statistics: Statistics | None) -> Policy:
        logp = logp_of(inputs.new, "new")
        return Policy(logp, logp_of(inputs.old, "old"), torch.zeros_like(logp))

    def limit(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        """The limited ratio, which depends on the advantage; both are per token or both per response."""
        return ratio

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        """[N] factor that multiplies the advantage."""
        return Term(self.limit(ratio, inputs.advantage))


class Ratio(Method):
    """Compares the policy with the old one. A method whose weights are not computed token by token (group
    transforms) overrides `score`.

    clip  (eps_low, eps_high) of a clip of this ratio, where the configuration says nothing
    """

    clip: ClassVar[tuple[float, float]] = (0.2, 0.2)

    @abstractmethod
    def ratio(self, policy: Policy, inputs: ObjectiveInputs) -> Tensor:
        """[N] ratio, differentiable."""

    def policy_statistics(self, policy: Policy, inputs: ObjectiveInputs) -> Statistics:
        """Like `statistics`, for the policy that the trust region returns."""
        return {}

    def score(
        self, region: TrustRegion, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        """[N] surrogate times advantage."""
        ratio = self.ratio(policy, inputs)
        limited = region.surrogate(ratio, policy, inputs, statistics)
        weight = limited.value if limited.weight is None else limited.weight
        per_token = {"ratio": ratio.detach()} | limited.per_token
        return Term(limited.value * inputs.advantage, per_token, weight.detach() * inputs.advantage)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"ratio": ("mean", "max", "min")}


class Kl(Method):
    @abstractmethod
    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        """[N] penalty, including its coefficient."""


class Correction(Method):
    @abstractmethod
    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        """[N] weight, detached; multiplies only the score."""


class Bonus(Method):
    @abstractmethod
    def value(self, inputs: ObjectiveInputs) -> Tensor:
        """[N] bonus, including its coefficient; added to the objective."""


def logp_of(readings: HeadOutputs, side: str) -> Tensor:
    if readings.logp is None:
        raise ValueError(
            f"this objective reads the {side} policy's log-prob of the sampled token; none was given"
        )
    return readings.logp


def limited(log_ratio: Tensor) -> Tensor:
    """Clamp a log-ratio to [-20, 20], as in verl, so that exp stays finite. No gradient beyond the limits."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def importance_ratio(new: Tensor, old: Tensor) -> Tensor:
    """new / old, elementwise, from log-probs."""
    return limited(new - old).exp()


def unit(logp: Tensor) -> Tensor:
    """1 with the gradient of logp: c * unit(logp) has the value c and the gradient c d logp."""
    return torch.exp(logp - logp.detach())


def refuse_rows(bad: Tensor, problem: str) -> None:
    """Raises ValueError that names the first positions at which bad [N] is true. Waits for the device."""
    rows = bad.nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(f"{problem} at {len(rows)} of {len(bad)} positions, the first: {rows[:8]}")


DECILES = 10


def lengths(inputs: ObjectiveInputs) -> Tensor:
    """[N] number of tokens of the response that each token belongs to."""
    return inputs.segments.expand(inputs.segments.sum(torch.ones_like(inputs.advantage)))


def maximum(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[N] largest value of the token's response. values [N] detached."""
    segments = inputs.segments
    lowest = values.new_full((len(inputs.rollout),), float("-inf"))
    return segments.expand(lowest.scatter_reduce(0, segments.owner, segments.whole(values), "amax"))


def once(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[N] a diagnostic that counts once per response: NaN except on the first token of the response."""
    return torch.where(inputs.position == 0, values, float("nan"))


def by_decile(name: str, values: Tensor, inputs: ObjectiveInputs) -> dict[str, Tensor]:
    """values [N] per tenth of each response, NaN outside it: tenth i starts at i/10 of the length."""
    decile = torch.floor(DECILES * inputs.position / lengths(inputs))
    return {f"{name}_decile_{i}": torch.where(decile == i, values, float("nan")) for i in range(DECILES)}


def decile_diagnostics(name: str, *reductions: Reduction) -> Diagnostics:
    return {f"{name}_decile_{i}": reductions for i in range(DECILES)}
