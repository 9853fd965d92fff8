from collections.abc import Mapping
from typing import Any

import torch
from troll_kernels.sparsify import sparse_logp

from megatron_troll.objectives.trust_region.troll import Troll
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, topk_record
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    vocab, p_d = case["V"], case["p_d"]
    logits = floats(case["logits"], dtype)[None]
    record = topk_record(logits, torch.tensor([case["token"]]), case["K"], case["delta"])
    if case.get("side") == "old":
        Troll(k=case["K"], delta=case["delta"], p_d=p_d).prepare_old(HeadOutputs(None, record, None))
    count = int(record.count)
    kept, order = record.ids[0, :count].sort()
    logp = sparse_logp(record.logits, record.count, vocab, p_d)[0, :count][order]
    covered = logits.softmax(1)[0, kept].sum()
    return {
        "kept_ids": kept.tolist(),
        "kept_count": count,
        "n_default": vocab - count,
        "covered_mass": float(covered),
        "gamma": float((1 - (vocab - count) * p_d) / covered),
        "logp_kept": logp.tolist(),
        "total_mass": float(logp.exp().sum() + (vocab - count) * p_d),
    }


RUNNER = Runner(run, frozenset({"V", "K", "delta", "p_d", "token", "logits", "side"}))
