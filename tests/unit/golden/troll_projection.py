from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor
from troll_kernels.project import Projection, project
from troll_kernels.sparsify import sparse_logp

from tests.unit.golden.records import floats
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    vocab, p_d = case["V"], case["p_d"]
    old_ids, new_ids = torch.tensor(case["old_ids"]), torch.tensor(case["new_ids"])
    new_logits = floats(case["new_logits"], dtype)[None].requires_grad_()
    old_logp = _sparse(floats(case["old_logits"], dtype)[None], vocab, p_d)
    new_logp = _sparse(new_logits, vocab, p_d)
    bound = torch.tensor([case["eps"]], dtype=dtype)
    projection = project(new_ids[None], new_logp, old_ids[None], old_logp, bound, vocab, p_d)
    union, proj_union = _union(projection, old_ids, new_ids)
    functional = _functional(case, projection, proj_union)
    functional.backward()
    new_union = _on_union(union, new_ids, new_logp[0].detach(), log(p_d))
    n_default = int(projection.outside)
    kl_proj_new = (proj_union.exp() * (proj_union - new_union)).sum()
    kl_proj_new = kl_proj_new + n_default * projection.default[0].exp() * (projection.default[0] - log(p_d))
    tau = float(projection.tau)
    assert new_logits.grad is not None
    return {
        "old_logp": old_logp[0].tolist(),
        "new_logp": new_logp[0].tolist(),
        "union_ids": union.tolist(),
        "n_default": n_default,
        "active": bool(projection.active),
        "tau": tau,
        "eta": 1 / tau - 1 if tau else float("inf"),
        "proj_logp_union": proj_union.tolist(),
        "proj_logp_default": float(projection.default) if n_default else None,
        "kl_new_old": float(projection.kl_before),
        "kl_proj_old": float(projection.kl_after),
        "kl_new_proj": float(projection.kl_new_pi),
        "kl_proj_new": float(kl_proj_new),
        "functional_value": float(functional),
        "grad_functional_wrt_new_logits": new_logits.grad[0].tolist(),
    }


def _sparse(logits: Tensor, vocab: int, p_d: float) -> Tensor:
    return sparse_logp(logits, torch.tensor([logits.shape[1]]), vocab, p_d)


def _union(projection: Projection, old_ids: Tensor, new_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The union of both supports, ascending, and the projection on it (differentiable)."""
    union = torch.cat((old_ids, new_ids)).unique()
    values = dict(zip(old_ids.tolist(), projection.old[0])) | dict(zip(new_ids.tolist(), projection.new[0]))
    return union, torch.stack([values[i] for i in union.tolist()])


def _on_union(union: Tensor, ids: Tensor, logp: Tensor, default: float) -> Tensor:
    values = dict(zip(ids.tolist(), logp.tolist()))
    return logp.new_tensor([values.get(i, default) for i in union.tolist()])


def _functional(case: Mapping[str, Any], projection: Projection, proj_union: Tensor) -> Tensor:
    value = (floats(case["functional_coef_union"], proj_union.dtype) * proj_union.exp()).sum()
    n_default = int(projection.outside)
    return value + n_default * case["functional_coef_default_per_token"] * projection.default[0].exp()


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"V", "p_d", "eps", "old_ids", "old_logits", "new_ids", "new_logits"}
        | {"functional_coef_union", "functional_coef_default_per_token"}
    ),
    gradients=frozenset({"grad_functional_wrt_new_logits"}),
    float64_only=frozenset({"eta"}),
)
