"""This file has lists by name in place of cases."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from megatron_troll.advantages.dr_grpo import DrGrpo
from megatron_troll.advantages.grpo import Grpo
from megatron_troll.observe.runs import jitter2
from tests.unit.golden.runner import TEXT, Runner


def cases(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    names = content.keys() - TEXT - {"method", "description"}
    return [{**case, "name": f"{name}-{i}"} for name in sorted(names) for i, case in enumerate(content[name])]


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    if "series" in case:
        return {"jitter2": jitter2(case["series"])}
    methods = {
        "adv_unbiased_eps1e6": Grpo(),
        "adv_biased_eps1e6": Grpo(ddof=0),
        "adv_centred": DrGrpo(),
    }
    rewards = torch.tensor(case["rewards"], dtype=dtype)
    group = torch.zeros(len(rewards), dtype=torch.int64)
    if len(rewards) < 2:  # golden 0; we refuse it, so that no run learns nothing unawares
        for method in methods.values():
            with pytest.raises(ValueError, match=r"needs rollout\.samples >= 2"):
                method(rewards, group)
        return {name: [0.0] for name in methods}
    return {name: method(rewards, group).tolist() for name, method in methods.items()}


RUNNER = Runner(run, frozenset({"rewards", "series"}))
