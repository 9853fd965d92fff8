"""CPPO: early tokens count for more, and a response has a budget (arXiv 2606.10968; ALGORITHMS 2)."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_troll.config import NonNegative, Positive, PositiveFloat
from megatron_troll.objectives import budget
from megatron_troll.objectives.budget import places, scan
from megatron_troll.objectives.divergence import Divergence
from megatron_troll.objectives.masking import Masking, outward
from megatron_troll.objectives.slots import Diagnostics, Statistics, Term, lengths, logp_of
from megatron_troll.types import ObjectiveInputs

QUANTILE = 0.9


def _constant(place: int) -> Callable[[dict[str, Any]], float]:
    """The paper's default for the chosen divergence: delta (place 0) or delta_b (place 1)."""
    return lambda data: (budget.TV if data["divergence"].endswith("tv") else budget.KL)[place]


class Accounts(NamedTuple):
    """Budget accounts of each token, [L] float64: w, D, S and W up to and including the token, c."""

    weight: Tensor
    divergence: Tensor
    spent: Tensor
    total: Tensor
    threshold: Tensor

    @property
    def charge(self) -> Tensor:
        """w D [L]."""
        return self.weight * self.divergence


class Cppo(Masking):
    """M_t = 1 if A_t (rho_t - 1) <= 0 or w_t D_t <= c_t, with w_t and c_t of objectives/budget.py.

    S and W run over all tokens of a response, kept or masked, inward or outward: the prefix of later
    tokens has drifted in each case. Tokens with w_t D_t = c_t pass. T is the length of the response
    (Algorithm 1). delta is the paper's (0.2 for mixtures of experts), delta_b 0.02 the default of its
    sensitivity study.

    `gate_shape: soft` scales an outward token over its threshold by 1 / x_t, where x_t is the larger of
    w_t D_t / delta and S_t / (delta + delta_b W_{t-1})   (eq. 19, 20).

    `delta_b_min` is the paper's adaptive budget: each response has its own delta_b (eq. 22),

        min(2 b, max(b, P90(D_1, ..., D_T))),   b = delta_b_min,

    of the unweighted D of all its tokens under the current policy. How its percentile interpolates is not
    said; ours is linear between the two nearest of the sorted D, as torch.quantile and numpy.percentile have
    it. `delta_b_step` is a rule of our own, with one value for the whole step.
    """

    divergence: Divergence = Field(
        default="topk_tv", description="of {sampled token, rest} or of the top-K and the rest"
    )
    delta: NonNegative = Field(
        default_factory=_constant(0),
        description="largest weighted divergence of one token; 0.15 for TV (MoE 0.2), 0.1 for KL",
    )
    delta_b: NonNegative = Field(
        default_factory=_constant(1),
        description="budget that each token adds for those after it; 0.02 for TV, 0.002 for KL",
    )
    delta_b_min: PositiveFloat | None = Field(
        default=None,
        description="b of the paper's adaptive budget, in place of delta_b: the 90th percentile of the "
        "response's D, within [1, 2] times this (0.02 for TV)",
    )
    delta_b_step: PositiveFloat | None = Field(
        default=None,
        description="in place of delta_b, one value for the step: the 90th percentile over its responses of "
        "S_T / W_T, within [2, 4] times this (0.01 for TV)",
    )
    w_min: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8, description="weight of the last token; the first has 1"
    )
    t_ref: Positive | None = Field(
        default=None,
        description="tokens over which the weight falls to w_min; default: the response's length",
    )
    weights: Literal["schedule", "uniform", "shuffled"] = Field(
        default="schedule", description="uniform: all 1; shuffled: the schedule's, at random places"
    )
    use_budget: bool = Field(default=True, description="false: every token has the threshold delta")
    gate_shape: Literal["hard", "soft"] = Field(
        default="hard", description="soft: an outward token over its threshold is scaled, not rejected"
    )

    @model_validator(mode="after")
    def _budget_is_used(self) -> Self:
        adaptive = [key for key in ("delta_b_min", "delta_b_step") if getattr(self, key) is not None]
        if len(adaptive) > 1:
            raise ValueError("delta_b_min and delta_b_step are two rules for one delta_b; set one to null")
        if adaptive and not self.use_budget:
            raise ValueError(f"{adaptive[0]} is about a budget: use_budget: false needs {adaptive[0]}: null")
        return self

    @property
    def diagnostics(self) -> Diagnostics:
        return {
            **super().diagnostics,
            "masked_by_weight": ("mean",),
            "masked_by_budget": ("mean",),
            "threshold": ("min",),
            "delta_b": ("mean",),
            "budget_exhausted": ("mean",),
            "response_divergence": ("p50", "p90"),
        }

    @property
    def needs_statistics(self) -> bool:
        return self.delta_b_step is not None

    def statistics(self, inputs: ObjectiveInputs) -> Statistics:
        """S_T and W_T of every response of the rollout batch, [rollouts] each."""
        if self.delta_b_step is None:
            return {}
        behind = logp_of(inputs.old, "old") if self.against == "old" else inputs.rollout_logp
        divergence = self.compare(logp_of(inputs.new, "new").detach(), behind, inputs)
        weight = inputs.segments.mine(self._weights(inputs))
        response = inputs.segments.expand(inputs.rollout)
        zeros = weight.new_zeros(inputs.rollouts)
        return {
            "cppo_spent": zeros.index_add(0, response, weight * divergence.double()),
            "cppo_weight": zeros.index_add(0, response, weight),
        }

    def gate(
        self, divergence: Tensor, log_rho: Tensor, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        delta_b = self._delta_b(divergence, inputs, statistics)
        accounts = self.accounts(divergence, inputs, delta_b)
        mine, dtype = inputs.segments.mine, divergence.dtype
        charge, threshold = mine(accounts.charge).to(dtype), mine(accounts.threshold).to(dtype)
        over = (charge > threshold) & outward(log_rho, inputs.advantage) & (inputs.advantage != 0)
        soft = self.gate_shape == "soft"
        left = mine(self._softened(accounts, delta_b)).to(dtype) if soft else torch.zeros_like(charge)
        heavy = over & (charge > self.delta)
        per_token = {
            "masked_by_weight": heavy.to(dtype),
            "masked_by_budget": (over & ~heavy).to(dtype),
            "threshold": threshold,
            "delta_b": mine(torch.zeros_like(accounts.weight) + delta_b).to(dtype),
        }
        return Term(torch.where(over, left, 1.0), per_token | self._of_responses(accounts, inputs))

    def accounts(self, divergence: Tensor, inputs: ObjectiveInputs, delta_b: float | Tensor) -> Accounts:
        """Accounts of every token of the micro-batch's responses, from D [N] and delta_b, one or [L]."""
        owner = inputs.segments.owner
        whole = inputs.segments.whole(divergence).double()
        weight = self._weights(inputs)
        if self.use_budget:
            threshold = budget.raw_thresholds(whole, weight, owner, self.delta, delta_b)
        else:
            threshold = torch.full_like(whole, self.delta)
        spent = scan(weight * whole, owner, torch.add)
        return Accounts(weight, whole, spent, scan(weight, owner, torch.add), threshold)

    def _softened(self, accounts: Accounts, delta_b: float | Tensor) -> Tensor:
        """1 / max(x_t, 1) [L]."""
        of_token = _share(accounts.charge, self.delta)
        if not self.use_budget:
            return of_token
        allowed = self.delta + delta_b * (accounts.total - accounts.weight)
        return torch.minimum(of_token, _share(accounts.spent, allowed))

    def _weights(self, inputs: ObjectiveInputs) -> Tensor:
        """w [L]."""
        segments = inputs.segments
        if self.weights == "uniform":
            return torch.ones_like(segments.owner, dtype=torch.float64)
        step = places(segments.owner)
        if self.weights == "shuffled":
            step = _shuffled(step, segments.whole(inputs.uniform), segments.owner)
        horizon = segments.whole(lengths(inputs)).double() if self.t_ref is None else self.t_ref
        return budget.schedule(step, horizon, self.w_min)

    def _delta_b(
        self, divergence: Tensor, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> float | Tensor:
        """One delta_b, or that of each token's response [L]."""
        if self.delta_b_min is not None:
            whole, owner = inputs.segments.whole(divergence).double(), inputs.segments.owner
            own = budget.quantile(whole, owner, QUANTILE)
            return own.clamp(self.delta_b_min, 2 * self.delta_b_min)
        if self.delta_b_step is None:
            return self.delta_b
        if statistics is None:
            raise ValueError("cppo with delta_b_step needs the statistics of the step")
        weight = statistics["cppo_weight"]
        mean = torch.where(weight > 0, statistics["cppo_spent"] / weight, float("nan"))
        return mean.nanquantile(QUANTILE).clamp(2 * self.delta_b_step, 4 * self.delta_b_step)

    def _of_responses(self, accounts: Accounts, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        """Diagnostics of each response, on its last token: whether its budget ran out, and S_T / W_T."""
        mine, owner = inputs.segments.mine, inputs.segments.owner
        last = inputs.position == lengths(inputs) - 1
        lowest = mine(scan(accounts.threshold, owner, torch.minimum))
        mean = mine(accounts.spent / accounts.total)
        found = {"budget_exhausted": (lowest <= 0).double(), "response_divergence": mean}
        return {name: torch.where(last, values, float("nan")) for name, values in found.items()}


def _share(spent: Tensor, allowed: float | Tensor) -> Tensor:
    """The share of `spent` that is allowed; 1 if all of it is."""
    return torch.where(spent > allowed, allowed / spent, 1.0)


def _shuffled(step: Tensor, uniform: Tensor, owner: Tensor) -> Tensor:
    """Token places [L], shuffled within each response by the order of the tokens' random numbers."""
    order = uniform.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    return torch.empty_like(step).scatter(0, order, step)
