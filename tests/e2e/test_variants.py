"""Short runs of settings that a user may choose; each trains on what it draws, with finite figures."""

import pytest

from megatron_troll.observe.rollouts import read_step
from tests.e2e.workplace import Workplace, two_steps

VARIANTS = {
    "bf16-clip": (
        "models.policy.dtype=bf16",
        "models.policy.recompute=full",
        "models.policy.optimizer.distributed=false",
        "objective.trust_region.name=clip",
    ),
    "stages-engine-unpacked": (
        "models.policy.layout={tp: 1, ep: 1, pp: 2}",
        "objective.old=engine",
        "objective.trust_region.support=own",
        "train.packing=false",
    ),
    "data-parallel-experts": (
        "models.policy.layout={tp: 1, ep: 2}",
        "models.policy.moe.aux_loss=0.01",
        "rollout.kv_cache=fp8_e4m3",
        "train.replay=rollout",
        "reward={name: exact}",
        "checkpoint.asynchronous=true",
    ),
    "replicas-refilled": (
        "models.policy.layout={tp: 1, ep: 1}",
        "rollout.refill=2",
        "reward.name=tests.e2e.rewards:Starts",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_of(warm: Workplace, name: str) -> None:
    rows = two_steps(warm, name, *VARIANTS[name])
    assert [key for row in rows for key, value in row.items() if value is None] == []
    assert (warm.run(name) / "checkpoints" / "step_000002").is_dir()
    assert not (warm.run(name) / "hf").exists()


def test_each_variant_did_what_it_was_asked(warm: Workplace) -> None:
    clip, engine, experts, refilled = (warm.metrics(name)[-1] for name in VARIANTS)
    assert "clipped" in clip
    assert "projected" not in clip
    # bf16 rounds a token's log-prob at the third digit; the engine's own record is the old policy itself.
    assert clip["rollout_trainer_gap/max"] > 1e-4
    assert engine["rollout_trainer_gap/max"] == 0
    assert experts["rollout_trainer_gap/max"] > 1e-4
    # A rounded cache moves some tokens to other experts.
    assert 0 < experts["replay_changed"] < 0.2
    assert refilled["refill_rounds"] >= 1
    stored = list(read_step(warm.run("replicas-refilled"), 2))
    assert len(stored) == refilled["sampled_responses"] > 32
    assert sum(sample.advantage != 0 for sample in stored) == 32 * (1 - refilled["frac_zero_std_groups"])
