"""What the plan counts for rollouts and micro-batches, by hand."""

import pytest

from megatron_troll.config import Config
from megatron_troll.config.document import parse
from megatron_troll.config.load import PRESETS, assemble, read
from megatron_troll.launch.plan.build import Plan, plan

RUN = """
name: run
data: {files: [prompts.jsonl], max_prompt_tokens: 1000}
rollout: {prompts: 64, samples: 8, top_k: 64, staleness: 1, sampling: {max_tokens: 3000}}
train: {token_budget: 8192, epochs: 1}
"""
TOKENS, ANSWERS = 3999, 3000


def planned(more: str = "") -> Plan:
    presets = [read(PRESETS / f"{name}.yaml") for name in ("qwen3_30b_a3b", "troll")]
    return plan(assemble([*presets, parse(RUN, "run"), parse(more or "{}", "more")]))


def dp(config: Config, world: int) -> int:
    layout = config.policy.layout
    return world // (layout.tp * layout.pp * layout.cp)


def test_a_rollout_costs_12_bytes_a_token_on_every_rank() -> None:
    found = planned()
    replicas = dp(found.config, found.world)
    responses = found.work.responses * replicas
    assert responses == 512
    assert found.host["rollouts"] == 2 * 12 * responses * ANSWERS
    assert found.host["micro-batches"] == found.work.responses * (13 * TOKENS + 36 * ANSWERS)
    assert found.host["records"] == 0


def test_records_cost_8_bytes_an_entry_on_rank_0() -> None:
    found = planned("objective: {old: engine}")
    assert found.host["records"] == 2 * 512 * ANSWERS * 64 * 8
    assert found.host["micro-batches"] == found.work.responses * (13 * TOKENS + (36 + 8 * 65) * ANSWERS)


def test_experts_are_counted_where_they_are_replayed() -> None:
    found = planned("train: {replay: rollout}\nserve: {routed_experts: true}")
    assert found.host["records"] == 2 * 512 * TOKENS * 48 * 8


def test_one_micro_batch_is_on_the_device() -> None:
    (stage,) = planned().stages
    micro = 8192
    assert stage.training["batch"] == 21 * micro + 52 * (micro * ANSWERS // TOKENS)


@pytest.mark.parametrize(("via", "expected"), [("disk", None), ("tensor", 2 * 256 * 2**20)])
def test_a_sync_holds_two_buckets(via: str, expected: int | None) -> None:
    sync = f"sync: {{via: {via}, bucket_mib: 256}}"
    (stage,) = planned(f"rollout: {{engine: sglang, sglang: {{colocated: false, {sync}}}}}").stages
    assert stage.generation.get("weight sync") == expected
