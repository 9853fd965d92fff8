from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.divergence import Divergence, topk
from megatron_troll.types import NO_ID, LossTerms, ObjectiveInputs, TopK
from tests.unit.golden.records import floats, topk_record
from tests.unit.golden.runner import Runner
from tests.unit.objectives.rows import Rows


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    response = Response(_rows(case, dtype), tuple(token["K"] for token in case["tokens"]))
    fields: dict[str, Any] = {"tokens": _tokens(response)}
    for name, golden in case.items():
        if isinstance(golden, dict):
            fields[name] = _method(name, golden, response)
    return fields


@dataclass(frozen=True)
class Response:
    """The rows of a case, and how many tokens the rollout engine kept at each position."""

    rows: Rows
    kept: tuple[int, ...]

    def record(self) -> TopK:
        """The engine's record; rows that keep fewer than the widest are padded."""
        rows, width = self.rows, max(self.kept)
        logp = rows.mu.log_softmax(1)
        wide = topk_record(logp, rows.target, width, 0.0)
        for i, k in enumerate(self.kept):
            one = topk_record(logp[i : i + 1], rows.target[i : i + 1], k, 0.0)
            used = one.ids.shape[1]
            wide.ids[i], wide.logits[i], wide.count[i], wide.place[i] = (
                NO_ID,
                -torch.inf,
                one.count,
                one.place,
            )
            wide.ids[i, :used], wide.logits[i, :used] = one.ids[0], one.logits[0]
        return wide

    def terms(self, objective: Objective) -> tuple[ObjectiveInputs, LossTerms, Tensor]:
        """Also dJ / d log pi(o) of each token."""
        inputs, record = self.rows.inputs(objective), self.record()
        log_pi = self.rows.new.detach().log_softmax(1)
        at_rollout = torch.where(record.valid, log_pi.gather(1, record.ids.clamp(min=0)), -torch.inf)
        logp = log_pi.gather(1, self.rows.target[:, None])[:, 0].requires_grad_()
        new = replace(inputs.new, logp=logp, at_rollout=at_rollout)
        inputs = replace(inputs, new=new, rollout_topk=record)
        terms = objective.loss(inputs)
        (gradient,) = torch.autograd.grad(terms.loss, logp)
        return inputs, terms, -gradient

    def divergence(self, kind: Divergence) -> Tensor:
        _, terms, _ = self.terms(_objective("dppo", divergence=kind, k=max(self.kept)))
        return terms.per_token["divergence"]


def _rows(case: Mapping[str, Any], dtype: torch.dtype) -> Rows:
    """The old policy is the rollout policy: the only ratio of the file."""
    tokens = case["tokens"]
    mu = torch.stack([floats(token["mu_logits"], dtype) for token in tokens])
    one = torch.zeros(1, dtype=torch.int64)
    return Rows(
        new=torch.stack([floats(token["pi_logits"], dtype) for token in tokens]).requires_grad_(),
        old=mu,
        mu=mu,
        reference=mu,
        target=torch.tensor([token["token"] for token in tokens]),
        weight=torch.ones(len(tokens), dtype=dtype),
        uniform=torch.zeros(len(tokens), dtype=dtype),
        owner=torch.zeros(len(tokens), dtype=torch.int64),
        advantage=torch.tensor([case["advantage"]], dtype=dtype),
        group=one,
        rollout=one,
        rollouts=1,
    )


def _objective(name: str, slot: str = "trust_region", **fields: Any) -> Objective:
    config = ObjectiveConfig(trust_region=Slot(name="none"))
    method = Slot.model_validate({"name": name} | fields)
    return compose(config.model_copy(update={slot: method}))


def _tokens(response: Response) -> list[Mapping[str, Any]]:
    rows, record = response.rows, response.record()
    inputs, terms, _ = response.terms(_objective("none"))
    assert inputs.new.logp is not None
    log_mu, log_pi = rows.mu.log_softmax(1), rows.new.detach().log_softmax(1)
    everything = torch.ones_like(log_mu, dtype=torch.bool)
    columns = {
        "logp_mu": inputs.rollout_logp,
        "logp_pi": inputs.new.logp,
        "ratio": terms.per_token["ratio"],
        "D_bin_tv": response.divergence("binary_tv"),
        "D_bin_kl": response.divergence("binary_kl"),
        "D_topk_tv": response.divergence("topk_tv"),
        "D_topk_kl": response.divergence("topk_kl"),
        "D_full_tv": topk(log_mu, log_pi, everything, log_mu.shape[1], "topk_tv"),
        "D_full_kl_mu_pi": topk(log_mu, log_pi, everything, log_mu.shape[1], "topk_kl"),
    }
    return [
        {"reduced_ids": record.ids[i, : int(record.count[i])].sort().values.tolist()}
        | {name: float(values[i]) for name, values in columns.items()}
        for i in range(len(response.kept))
    ]


def _method(name: str, golden: Mapping[str, Any], response: Response) -> Mapping[str, Any]:
    if name.startswith(("dppo_D", "trm_")):
        kept = _kept(name, golden["delta"], response)
        return {"mask": kept.tolist()} if name.startswith("dppo") else {"seq_keep": bool(kept.all())}
    if name == "dppo_is_weight":
        return {"w": _weight(_objective("dppo", delta=1e9, cap=golden["C"]), response)}
    if name in ("cispo", "ppo"):
        region = {"cispo": "cispo", "ppo": "clip"}[name]
        objective = _objective(region, eps_low=golden["eps_low"], eps_high=golden["eps_high"])
        _, terms, gradient = response.terms(objective)
        weight = {} if name == "ppo" else {"weight": _weight(objective, response)}
        value = terms.per_token["objective"].tolist()
        return {"value": value, "grad_coef_logp": gradient.tolist()} | weight
    if name == "minpro_reconstructed":
        return {"weight": _weight(_objective("minpro", eps_high=1e9), response)}
    assert name in ("tis", "icepop"), name
    fields = {"cap": golden["C"]} if name == "tis" else {key: golden[key] for key in ("alpha", "beta")}
    return {"weight": _correction(_objective(name, "correction", **fields), response)}


def _kept(name: str, delta: float, response: Response) -> Tensor:
    """[N] bool; the masks of names like dppo_D_bin_tv, trm_avg_D_topk_kl."""
    method, _, kind = name.partition("_D_")
    fields: dict[str, Any] = {"divergence": kind.replace("bin", "binary"), "delta": delta}
    if method != "dppo":
        method, _, fields["over"] = method.partition("_")
    _, terms, _ = response.terms(_objective(method, k=max(response.kept), **fields))
    return terms.per_token["masked"] == 0


def _weight(objective: Objective, response: Response) -> list[float]:
    """What multiplies A log pi, read off at A = 1: a weight does not depend on it."""
    rows = replace(response.rows, advantage=torch.ones_like(response.rows.advantage))
    _, _, gradient = replace(response, rows=rows).terms(objective)
    return gradient.tolist()


def _correction(objective: Objective, response: Response) -> list[float]:
    """The ratio of the file as that of the old policy over the rollout policy."""
    rows = replace(response.rows, old=response.rows.new.detach())
    inputs, _, _ = replace(response, rows=rows).terms(objective)
    policy = objective.trust_region.policy(inputs, None)
    return objective.correction.weight(inputs, policy, None).value.tolist()


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"advantage", "mu_logits", "pi_logits", "token", "K", "delta", "C", "eps_low", "eps_high"}
        | {"alpha", "beta"}
    ),
    gradients=frozenset({"grad_coef_logp"}),
)
