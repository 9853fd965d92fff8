"""Two steps of methods that bring more than the policy: a reference model, a critic, the engine's record."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_troll.objectives.compose import SLOTS
from tests.e2e.workplace import REPOSITORY, Workplace, succeed, two_steps

REFERENCE = "models.reference.path=runs/demo-warm-start/hf"
METHODS = {
    "tike": (
        REFERENCE,
        "objective.kl={name: tike, k: 8, beta: 0.01}",
        "objective.entropy_bonus=0.01",
        "objective.entropy_over=sparse",
    ),
    "exact": (REFERENCE, "objective.trust_region.name=cppo", "objective.kl={name: exact, beta: 0.01}"),
    "jackpot": (
        "objective.trust_region.name=clip",
        "objective.correction.name=jackpot",
        "observe.energy=true",
    ),
    "ppo": (
        "objective.advantage.name=gae",
        "objective.trust_region.name=clip",
        "models.critic={path: runs/demo-warm-start/hf, dtype: fp32, layout: {ep: 2}, optimizer: {lr: 1e-3}}",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_of(warm: Workplace, name: str) -> None:
    two_steps(warm, name, *METHODS[name])


def test_the_policy_leaves_its_reference(warm: Workplace) -> None:
    for name in ("tike", "exact"):
        _, first, second = warm.metrics(name)
        assert 0 < first["reference_kl"] < second["reference_kl"]


def test_the_critic_learns_what_to_expect(warm: Workplace) -> None:
    _, first, second = warm.metrics("ppo")
    assert first["critic_explained_variance"] == 0  # its value head starts at 0
    assert second["critic_explained_variance"] != 0
    assert second["critic_skipped"] == 0
    assert (warm.run("ppo") / "checkpoints" / "step_000002").is_dir()


def test_the_energy_of_frequent_and_rare_tokens_adds_up(warm: Workplace) -> None:
    first = warm.metrics("jackpot")[1]
    assert first["energy"] > 0
    parts = [value for name, value in first.items() if name.startswith("energy_bucket")]
    assert sum(parts) == pytest.approx(first["energy"], rel=1e-5)


def test_copied_files_are_methods_of_every_slot(warm: Workplace, tmp_path: Path) -> None:
    """Nothing but the files is added to the package: they are listed, go together, and train."""
    copied = {
        "advantage": "grpo",
        "ratio": "token",
        "trust_region": "troll",
        "kl": "tike_sparse",
        "correction": "jackpot",
    }
    shutil.copytree(REPOSITORY / "megatron_troll", tmp_path / "megatron_troll")
    for slot, name in copied.items():
        folder = tmp_path / SLOTS[slot][0].replace(".", "/")
        shutil.copy(folder / f"{name}.py", folder / f"{name}_copy.py")
    place = replace(warm, package=tmp_path)
    listed = succeed(place.mtroll("methods")).out
    assert all(f"\n  {name}_copy " in listed for name in copied.values())
    chosen = [f"objective.{slot}.name={name}_copy" for slot, name in copied.items()]
    rows = two_steps(place, "copied", REFERENCE, "rollout.top_k=20", *chosen)
    assert {"kl_after", "reference_kl", "jackpot_accepted"} <= rows[2].keys()
