"""Studies and ablations: every run of every one is a configuration whose methods go together."""

from pathlib import Path

import pytest

from megatron_troll.config import Config, ConfigError
from megatron_troll.objectives.compose import compose
from megatron_troll.study.plan import Cell, load_plan

EXAMPLES = Path(__file__).parents[3] / "examples"
STUDIES = sorted([*EXAMPLES.glob("study/*.yaml"), *EXAMPLES.glob("ablations/*.yaml")])
SMALL = f"""
name: small
base: {EXAMPLES}/configs/cpu_troll.yaml
seeds: [3, 4]
config: {{train: {{steps: 7}}}}
settings:
  calm: {{}}
  wild: {{train: {{updates: 8}}, rollout: {{staleness: 1}}}}
methods:
  clip: {{extends: grpo}}
  tight: {{extends: [grpo, troll], objective: {{trust_region: {{bound: 0.01}}}}}}
"""


def write(folder: Path, text: str, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_plan(write(folder, text))
    return str(error.value)


def check(config: Config) -> None:
    objective = compose(config.objective)
    assert objective.needs_reference <= (config.models.reference is not None)
    assert objective.advantage.needs_values == (config.models.critic is not None)
    assert objective.rollout_k <= config.rollout.top_k


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_run_of(path: Path) -> None:
    plan = load_plan(path)
    of_one_seed = [cell for cell in plan.cells() if cell.seed == plan.study.seeds[0]]
    objectives = set()
    for cell in of_one_seed:
        config = plan.config(cell)
        check(config)
        objectives.add((cell.setting, config.objective.model_dump_json(), config.rollout.samples))
    assert len(objectives) == len(of_one_seed), "two methods are the same"
    assert all(plan.warm_start(plan.study.seeds[0], name).checkpoint.export for name in plan.warm_starts())


def test_the_study_has_its_methods_seeds_and_settings() -> None:
    plan = load_plan(EXAMPLES / "study" / "study.yaml")
    assert len(plan.methods) >= 12
    assert len(plan.study.seeds) >= 5
    pairs = [
        ("grpo", "grpo-troll"),
        ("dr-grpo", "dr-grpo-troll"),
        ("ppo", "ppo-troll"),
        ("gspo", "gspo-troll"),
    ]
    for clip, troll in pairs:
        one, other = (plan.config(Cell("stress", method, 0)).objective for method in (clip, troll))
        assert (one.trust_region.name, other.trust_region.name) == ("clip", "troll")
        same = other.model_copy(update={"trust_region": one.trust_region})
        assert same == one


def test_a_method_lies_over_its_setting_over_the_common_part(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, SMALL))
    assert [str(cell) for cell in plan.cells()] == [
        f"{setting}/{method}/seed-{seed}"
        for seed in (3, 4)
        for setting in ("calm", "wild")
        for method in ("clip", "tight")
    ]
    config = plan.config(Cell("wild", "tight", 4))
    assert (config.train.steps, config.train.updates, config.rollout.staleness) == (7, 8, 1)
    assert config.objective.trust_region.fields["bound"] == 0.01
    assert (config.runs, config.name, config.seed) == ("runs/small/seed-4/wild", "tight", 4)
    assert config.data.files == ("runs/demo/data/train.jsonl",)
    assert plan.config(Cell("calm", "clip", 3)).objective.trust_region.name == "clip"


def test_each_seed_has_its_own_task_and_warm_start(tmp_path: Path) -> None:
    warm = f"warm_start: {EXAMPLES}/configs/cpu_warm_start.yaml\n"
    plan = load_plan(write(tmp_path, SMALL + warm))
    sft, config = plan.warm_start(4, "warm-start"), plan.config(Cell("calm", "clip", 4))
    assert sft.seed == config.seed == 4
    assert config.policy.path == f"{sft.runs}/{sft.name}/hf"
    assert config.data == sft.data
    assert config.data.files == ("runs/small/seed-4/demo/data/train.jsonl",)


def test_a_rollout_model_has_a_warm_start_of_its_own(tmp_path: Path) -> None:
    warm = f"warm_start: {EXAMPLES}/configs/cpu_warm_start.yaml\n"
    own = f"rollout_warm_start: {EXAMPLES}/configs/cpu_small_warm_start.yaml\n"
    text = SMALL.replace("cpu_troll", "cpu_jackpot") + warm
    shared, plan = load_plan(write(tmp_path, text)), load_plan(write(tmp_path, text + own, "own.yaml"))
    cell = Cell("calm", "clip", 4)
    sft, small = (plan.warm_start(4, name) for name in ("warm-start", "rollout-warm-start"))
    rollout = plan.config(cell).models.rollout
    assert rollout is not None
    assert rollout.path == f"{small.runs}/{small.name}/hf"
    assert plan.config(cell).policy.path == f"{sft.runs}/{sft.name}/hf" != rollout.path
    assert (sft.policy.path, small.policy.path) == tuple(
        f"runs/small/seed-4/demo/{name}" for name in ("base", "small")
    )
    assert plan.digest(cell) != shared.digest(cell)


def test_an_extending_study_adds_to_the_common_part_and_replaces_the_rest(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    text = (
        "extends: study.yaml\nname: other\nconfig: {train: {epochs: 2}}\nmethods: {cppo: {extends: cppo}}\n"
    )
    plan = load_plan(write(tmp_path, text, "other.yaml"))
    config = plan.config(Cell("calm", "cppo", 3))
    assert (config.train.steps, config.train.epochs) == (7, 2)
    assert list(plan.methods) == ["cppo"]
    assert plan.study.seeds == (3, 4)


def test_unequal_compute_is_refused(tmp_path: Path) -> None:
    text = refused(tmp_path, SMALL + "  greedy: {extends: grpo, rollout: {samples: 16}}\n")
    assert "setting calm: clip and greedy do not get the same compute" in text


def test_a_comparison_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    comparison = "{claim: x, setting: calm, outcome: entropy, a: tigth, b: clip, expect: lower}"
    text = refused(tmp_path, f"{SMALL}comparisons: [{comparison}]\n")
    assert text == "comparison 'x': no 'tigth'; did you mean 'tight'?"


def test_a_wrong_key_is_named_with_its_place(tmp_path: Path) -> None:
    assert "seed: unknown key; did you mean 'seeds'? " in refused(tmp_path, SMALL + "seed: 3\n")
    wrong = SMALL.replace("staleness: 1", "stalenes: 1")
    message = refused(tmp_path, wrong)
    assert "rollout.stalenes: unknown key; did you mean 'staleness'?" in message
    assert "study.yaml line 8" in message
