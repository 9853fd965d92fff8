"""DFPO: sequence weights that cancel over their group (arXiv 2604.13088; ALGORITHMS 4.2)."""

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_troll.config import Pairing, PositiveFloat
from megatron_troll.objectives import transforms
from megatron_troll.objectives.ratio.gspo import CLIP, LARGEST, log_ratio
from megatron_troll.objectives.slots import (
    Diagnostics,
    Policy,
    Ratio,
    Statistics,
    Term,
    TrustRegion,
    once,
    unit,
)
from megatron_troll.objectives.transforms import totals
from megatron_troll.types import ObjectiveInputs


class ResponseGroups(NamedTuple):
    """The P responses of an optimizer step, float64.

    rollout   [P] index in the rollout batch
    log_s     [P] mean log-ratio of the tokens, 0 for an empty response
    advantage [P]
    group     [P] in [0, len(names)); names: prompt of each group, its index in the rollout batch
    weight, value   [P] sums over the tokens of weight_t and of weight_t log pi_t
    """

    rollout: Tensor
    log_s: Tensor
    advantage: Tensor
    group: Tensor
    names: Tensor
    weight: Tensor
    value: Tensor


class Dfpo(Ratio):
    """score_it = sg(s~_i) A_i log pi(o_it),  s~ = transform(s_bar, A) over each prompt's responses  (eq. 68)

    s_bar_i is GSPO's s_i after the trust region's limit: under clip, min(s, clip(s)) for A >= 0, else
    max(s, clip(s)) (eq. 47). s~ is detached; reported values are s~_i A_i. A sequence that GSPO clips keeps
    its gradient unless `drop_clipped`. The paper does not print its clip range; GSPO's is the default.

    alpha_it of eq. 68 is the aggregation: 1/T_i (the paper) under seq-mean-token-mean, and a constant under
    token-mean and seq-mean-token-sum-norm, with which prefixes shared by a whole group cancel exactly.

    `stop_gradient: false` is eq. 68 without sg: the product rule adds log pi d s~ to s~ d log pi, exact over
    micro-batches and ranks. (Differentiating sum s~ A itself would give exactly 0 for centred A.)

    With trust_region troll (experimental) s and log pi are those of the projected policy.
    Waits for the device in every micro-batch, to refuse groups that are incomplete or not centred.
    """

    family: ClassVar[str] = "response"
    clip: ClassVar[tuple[float, float]] = CLIP

    transform: Literal["min", "qp", "truncate", "orth"] = Field(
        default="qp", description="how the weights of a group are made to cancel"
    )
    allow_negative: bool = Field(default=False, description="orth: allow weights below 0")
    drop_clipped: bool = Field(default=False, description="no gradient from sequences that GSPO clips")
    stop_gradient: bool = Field(default=True, description="false: differentiate the transform too (ablation)")
    scale: PositiveFloat = Field(default=1.0, description="multiplies every weight (ablation)")
    floor: PositiveFloat = Field(
        default=1e-6, description="truncate: smallest weight before it is rebalanced"
    )

    @model_validator(mode="after")
    def _negative_is_asked_for(self) -> Self:
        if self.transform == "orth" and not self.allow_negative:
            raise ValueError("transform: orth can reverse updates; set allow_negative: true, or use qp")
        return self

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (
            Pairing("trust_region", ("unlimited",), "its weights are those that a clip leaves (eq. 47)"),
            Pairing(
                "advantage", ("critic",), "it weighs whole responses by advantages centred on their group"
            ),
        )

    @property
    def cautions(self) -> tuple[Pairing, ...]:
        reason = "dfpo weights made from the projected policy have no paper behind them"
        return (Pairing("trust_region", ("troll",), reason),)

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def diagnostics(self) -> Diagnostics:
        return {
            "sequence_ratio": ("mean", "max", "min"),
            "clipped_above": ("mean",),
            "clipped_below": ("mean",),
            "weight_change": ("mean", "min"),
            "weight_at_zero": ("mean",),
            "weight_variance": ("mean",),
            "group_multiplier": ("mean", "max", "min"),
            "group_imbalance_before": ("mean", "max"),
            "group_imbalance": ("mean", "max"),
            "group_imbalance_relative": ("mean", "max"),
            "asymmetry_before": ("mean",),
        }

    def ratio(self, policy: Policy, inputs: ObjectiveInputs) -> Tensor:
        """[N] s_i, before the transform."""
        return log_ratio(policy, inputs).exp()

    def policy_statistics(self, policy: Policy, inputs: ObjectiveInputs) -> Statistics:
        """Sums per response, [rollouts] each. Context-parallel ranks hold parts of the tokens but all of the
        responses, so per-response values are divided later by `copies`, the times they were counted."""
        if inputs.response_advantage is None:
            raise ValueError("dfpo weighs whole responses: it needs one advantage for each")
        zeros = torch.zeros(inputs.rollouts, dtype=torch.float64, device=policy.logp.device)
        response = inputs.segments.expand(inputs.rollout)
        logp, weight = policy.logp.detach().double(), inputs.weight.double()
        tokens = {
            "log_ratio": logp - policy.old.double(),
            "tokens": torch.ones_like(logp),
            "weight": weight,
            "value": weight * logp,
        }
        responses = {
            "copies": torch.ones_like(inputs.rollout),
            "advantage": inputs.response_advantage,
            "group": inputs.group,
        }
        sums = {name: zeros.index_add(0, response, x) for name, x in tokens.items()}
        sums |= {name: zeros.index_add(0, inputs.rollout, x.double()) for name, x in responses.items()}
        return {f"dfpo_{name}": total for name, total in sums.items()}

    def score(
        self, region: TrustRegion, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        if statistics is None:
            raise ValueError("dfpo needs the statistics of the step")
        groups = groups_of(statistics)
        transforms.refuse_groups(groups.advantage, groups.group, groups.names)
        counted, weights = self.weights(groups, groups.log_s, region)
        coefficient = weights * groups.advantage
        if not self.stop_gradient:
            coefficient = coefficient + self._slope(groups, region)
        zeros = coefficient.new_zeros(inputs.rollouts)

        def on_tokens(values: Tensor) -> Tensor:
            whole = zeros.index_copy(0, groups.rollout, values)
            return inputs.segments.expand(whole[inputs.rollout]).to(policy.logp.dtype)

        report = self._report(groups, counted, weights)
        per_token = {name: once(on_tokens(values), inputs) for name, values in report.items()}
        weighted = on_tokens(weights * groups.advantage)
        return Term(on_tokens(coefficient) * unit(policy.logp), per_token, weighted)

    def weights(self, groups: ResponseGroups, log_s: Tensor, region: TrustRegion) -> tuple[Tensor, Tensor]:
        """s_bar and s~ [P]."""
        s = log_s.clamp(max=LARGEST).exp()
        counted = region.limit(s, groups.advantage)
        weights = self.scale * self._transformed(counted, groups)
        if self.drop_clipped:
            weights = torch.where((counted != s) & (groups.advantage != 0), 0.0, weights)
        return counted, weights

    def _transformed(self, weights: Tensor, groups: ResponseGroups) -> Tensor:
        arguments = weights, groups.advantage, groups.group, len(groups.names)
        match self.transform:
            case "min":
                return transforms.lowest(*arguments)
            case "qp":
                return transforms.nearest(*arguments)
            case "truncate":
                return transforms.rebalanced(*arguments, self.floor)
            case "orth":
                return transforms.orthogonal(*arguments)

    def _slope(self, groups: ResponseGroups, region: TrustRegion) -> Tensor:
        """[P] term that the product rule adds to the coefficient of each token's log pi, before aggregation:
        log s is the mean of the response's log-ratios, and the tokens of a response share one weight."""
        with torch.enable_grad():
            log_s = groups.log_s.clone().requires_grad_()
            _, weights = self.weights(groups, log_s, region)
            (slope,) = torch.autograd.grad((weights * groups.advantage * groups.value).sum(), log_s)
        return torch.where(groups.weight > 0, slope / groups.weight, 0.0)

    def _report(self, groups: ResponseGroups, counted: Tensor, weights: Tensor) -> dict[str, Tensor]:
        a, s = groups.advantage, groups.log_s.clamp(max=LARGEST).exp()
        within = groups.group, len(groups.names)
        size = totals(torch.ones_like(a), *within)

        def variance(values: Tensor) -> Tensor:
            return totals((values - totals(values, *within) / size).square(), *within) / size

        imbalance, scale = totals(a * weights, *within).abs(), totals((a * weights).abs(), *within)
        return {
            "sequence_ratio": s,
            "clipped_above": ((counted < s) & (a != 0)).double(),
            "clipped_below": (counted > s).double(),
            "weight_change": weights / counted,
            "weight_at_zero": (weights == 0).double(),
            "weight_variance": variance(weights),
            "group_multiplier": transforms.multiplier(counted, a, *within),
            "group_imbalance_before": totals(a * counted, *within).abs(),
            "group_imbalance": imbalance,
            "group_imbalance_relative": imbalance / torch.where(scale > 0, scale, 1.0),
            "asymmetry_before": variance(counted * a),
        }


def groups_of(statistics: Statistics) -> ResponseGroups:
    copies = statistics["dfpo_copies"]
    rollout = copies.nonzero()[:, 0]
    sums = {
        name.removeprefix("dfpo_"): total[rollout]
        for name, total in statistics.items()
        if name.startswith("dfpo_")
    }
    names, group = (sums["group"] / sums["copies"]).round().long().unique(return_inverse=True)
    log_s = sums["log_ratio"] / sums["tokens"].clamp(min=1.0)
    return ResponseGroups(
        rollout, log_s, sums["advantage"] / sums["copies"], group, names, sums["weight"], sums["value"]
    )
