"""Ratios of the trainer's old policy to the rollout engine, shared by the corrections (ALGORITHMS 6.5)."""

from collections.abc import Mapping

from torch import Tensor

from megatron_troll.config import Pairing
from megatron_troll.objectives.slots import Diagnostics, Term, importance_ratio, logp_of
from megatron_troll.types import ObjectiveInputs

DIAGNOSTICS: Diagnostics = {"correction_weight": ("mean", "max"), "correction_weight_squared": ("mean",)}

OF_OLD_OVER_ROLLOUT = Pairing(
    "old",
    ("engine",),
    "it weighs by old over rollout, which is 1 with objective.old=engine; set correction none, or "
    "objective.old=trainer",
)


def old_over_rollout(inputs: ObjectiveInputs) -> Tensor:
    """old(o_t) / rollout(o_t) [N] over the full vocabulary, detached. Not from the old policy's sparse
    record, because the engine's log-prob is over the full vocabulary too."""
    return importance_ratio(logp_of(inputs.old, "old"), inputs.rollout_logp).detach()


def effective_sample_size(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metric effective_sample_size = (sum w)^2 / (N sum w^2), a share of a step's N tokens, from the
    means of the weights w and of w^2 in `metrics`; 0 if every weight is 0. {} without correction weights."""
    if "correction_weight" not in metrics:
        return {}
    mean, square = metrics["correction_weight"], metrics["correction_weight_squared"]
    return {"effective_sample_size": min(1.0, mean**2 / square) if square else 0.0}


def described(weight: Tensor, per_token: dict[str, Tensor]) -> Term:
    return Term(
        weight, {"correction_weight": weight, "correction_weight_squared": weight.square()} | per_token
    )
