"""TRM: a response is kept or masked as a whole (arXiv 2512.23075, the sequence mask; ALGORITHMS 6.2)."""

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from megatron_troll.config import NonNegative
from megatron_troll.objectives.divergence import Divergence
from megatron_troll.objectives.masking import Masking
from megatron_troll.objectives.slots import Diagnostics, Statistics, Term, lengths, maximum, once
from megatron_troll.types import ObjectiveInputs

DELTA = {"max": 0.1, "avg": 0.002}


class Trm(Masking):
    """M = 1 for every token of a response with max_t D_t <= delta (`max`) or mean_t D_t <= delta (`avg`).

    Taken from the abstract, and from CPPO's paper (appendix D): KL(mu || pi), with the thresholds of its
    ablation. No threshold on a TV is known to us, so that it has no default.
    """

    divergence: Divergence = Field(
        default="topk_kl", description="of {sampled token, rest} or of the top-K and the rest"
    )
    over: Literal["max", "avg"] = Field(
        default="max", description="statistic of a response's divergences that must not exceed delta"
    )
    delta: NonNegative = Field(
        default_factory=lambda data: DELTA[data["over"]],
        description="largest divergence of a response that is kept; default, of a KL only: 0.1 for max, "
        "0.002 for avg",
    )

    @model_validator(mode="before")
    @classmethod
    def _delta_is_on_the_scale(cls, data: Any) -> Any:
        if isinstance(data, dict) and str(data.get("divergence")).endswith("tv") and "delta" not in data:
            raise ValueError(
                f"divergence: {data['divergence']} needs a delta: the defaults are thresholds on a KL, and a "
                "KL of 0.1 allows a TV of up to 0.22, one of 0.002 up to 0.03 (Pinsker)"
            )
        return data

    @property
    def diagnostics(self) -> Diagnostics:
        return {**super().diagnostics, "responses_masked": ("mean",)}

    def gate(
        self, divergence: Tensor, log_rho: Tensor, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        if self.over == "max":
            over = maximum(divergence, inputs)
        else:
            over = inputs.segments.expand(inputs.segments.sum(divergence)) / lengths(inputs)
        kept = (over <= self.delta).to(divergence.dtype)
        return Term(kept, {"responses_masked": once(1.0 - kept, inputs)})
