"""Every method of the slots, so configured that on the fixed batch it acts on some tokens, not on others."""

from dataclasses import dataclass
from typing import Any

from megatron_troll.config import ObjectiveConfig

Fields = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """An objective; shares: metrics that must lie strictly between 0 and 1 where the method acts."""

    config: ObjectiveConfig
    shares: tuple[str, ...] = ()


def method(*shares: str, **slots: Any) -> Method:
    return Method(ObjectiveConfig.model_validate({"trust_region": {"name": "none"}} | slots), shares)


def clip(**fields: float) -> Fields:
    return {"name": "clip", "eps_low": 0.2, "eps_high": 0.25} | fields


def near(**kl: Any) -> Method:
    """A penalty beside a clip."""
    return method("clipped", trust_region=clip(), kl={"beta": 0.3} | kl)


def dfpo(**fields: Any) -> Method:
    bounds = clip(eps_low=0.02, eps_high=0.05)
    return method("clipped_above", "clipped_below", ratio={"name": "dfpo"} | fields, trust_region=bounds)


SPARSE: Fields = {"k": 12, "delta": 0.02, "p_d": 1e-5}
TROLL: Fields = {"name": "troll", "bound": 0.05, **SPARSE}
SMALLER: Fields = {"name": "tike_sparse", "beta": 0.3, "k": 6, "delta": 0.05, "p_d": 1e-5}
BUDGET: Fields = {"from": "cppo", "delta": 0.05, "delta_b": 0.03}
GSPO_CLIP = clip(eps_low=0.1, eps_high=0.06)

METHODS = {
    "none": method(),
    "clip": method(
        "clipped_above",
        "clipped_below",
        trust_region=clip(),
        aggregation="seq-mean-token-sum-norm",
        sum_norm_length=16,
    ),
    "symclip": method("clipped", trust_region={"name": "symclip", "eps": 0.15}),
    "symclip-weight": method("clipped", trust_region={"name": "symclip", "eps": 0.15, "grad": "weight"}),
    "gspo": method(
        "clipped", ratio={"name": "gspo"}, trust_region=GSPO_CLIP, aggregation="seq-mean-token-mean"
    ),
    "dfpo-min": dfpo(transform="min"),
    "dfpo-qp": dfpo(transform="qp"),
    "dfpo-truncate": dfpo(transform="truncate", drop_clipped=True),
    "dfpo-orth": dfpo(transform="orth", allow_negative=True, scale=0.5),
    "dfpo-product-rule": dfpo(transform="qp", stop_gradient=False),
    "cppo-tv": method(
        "masked_by_weight",
        "masked_by_budget",
        "budget_exhausted",
        trust_region={"name": "cppo", "k": 8, "delta": 0.12, "delta_b": 0.05},
    ),
    "cppo-kl": method(
        "masked_by_weight",
        "masked_by_budget",
        trust_region={
            "name": "cppo",
            "divergence": "binary_kl",
            "delta": 0.02,
            "delta_b": 0.005,
            "weights": "shuffled",
            "gate_shape": "soft",
        },
    ),
    "cppo-adaptive": method(
        "masked_by_weight",
        "masked_by_budget",
        trust_region={"name": "cppo", "k": 8, "delta": 0.12, "delta_b_min": 0.045, "gate_shape": "soft"},
    ),
    "cppo-step": method(
        "masked_by_weight",
        "masked_by_budget",
        trust_region={"name": "cppo", "k": 8, "delta": 0.12, "delta_b_step": 0.035},
    ),
    "dppo": method("masked", trust_region={"name": "dppo", "delta": 0.03}),
    "dppo-old": method(
        "masked",
        trust_region={"name": "dppo", "divergence": "topk_kl", "k": 8, "delta": 0.03, "against": "old"},
    ),
    "trm-max": method("responses_masked", trust_region={"name": "trm", "k": 8, "delta": 0.08}),
    "trm-avg": method("responses_masked", trust_region={"name": "trm", "k": 8, "over": "avg", "delta": 0.03}),
    "cispo": method("clipped", trust_region={"name": "cispo", "eps_low": 0.2, "eps_high": 0.25}),
    "minpro": method("clipped", trust_region={"name": "minpro", "eps_high": 0.0}),
    "troll-budget": method("projected", trust_region=TROLL | {"bound": BUDGET, "support": "own"}),
    "troll-budget-old": method("projected", trust_region=TROLL | {"bound": BUDGET, "support": "old"}),
    "k1": near(name="k1", is_weight="token", diff_is=True),
    "k2": near(name="k2"),
    "k3": near(name="k3", is_weight="token"),
    "k3_k2grad": near(name="k3_k2grad", is_weight="token"),
    "exact": near(name="exact"),
    "tike-own": near(name="tike", k=8, union_sampled=True),
    "tike-old": near(name="tike", k=8, support="old", tail="horvitz"),
    "tike-sparse-own": method(
        "projected", trust_region=TROLL | {"support": "own"}, kl=SMALLER | {"support": "own"}
    ),
    "tike-sparse-old": method(
        "projected", trust_region=TROLL | {"support": "old"}, kl=SMALLER | {"support": "old"}
    ),
    "tis": method("tis_truncated", trust_region=clip(), correction={"name": "tis", "cap": 1.1}),
    "icepop": method(
        "icepop_left_out", trust_region=clip(), correction={"name": "icepop", "alpha": 0.89, "beta": 1.14}
    ),
    "jackpot": method(
        "jackpot_accepted",
        "jackpot_z",
        trust_region=clip(),
        correction={"name": "jackpot", "k": 10},
    ),
    "jackpot-ref": method(
        "jackpot_accepted",
        "jackpot_weight_truncated",
        trust_region=TROLL,
        correction={"name": "jackpot", "k": 10, "target": "ref", "denominator": "accepted", "c1": 1.05},
        aggregation="seq-mean-token-mean",
    ),
    "entropy": method("clipped", trust_region=clip(), entropy_bonus=0.1),
    "entropy-sparse": method("projected", trust_region=TROLL, entropy_bonus=0.1, entropy_over="sparse"),
    "gae": method("clipped", advantage={"name": "gae"}, trust_region=clip()),
}
