"""Every preset and example is a configuration, and the examples are what the demo writes."""

from pathlib import Path

import pytest

from megatron_troll.config.load import PRESETS, load
from megatron_troll.objectives import compose
from megatron_troll.rewards.reward import build

EXAMPLES = Path(__file__).parents[3] / "examples" / "configs"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_loads_and_names_methods_that_exist(path):
    config = load(path)
    compose(config.objective)
    build(config.reward)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("cpu_*.yaml")), ids=lambda path: path.stem)
def test_the_examples_of_a_laptop_read_the_prompts_of_the_demo(path):
    assert load(path).data.files == ("runs/demo/data/train.jsonl",)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_lacks_only_what_a_run_must_say(path, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: {path.stem}\nname: x\nmodels: {{policy: {{path: p}}}}\ndata: {{files: [f]}}\n")
    assert load(run).policy.path == "p"


def test_clip_differs_from_troll_in_the_trust_region_only():
    troll, clip = load(EXAMPLES / "cpu_troll.yaml"), load(EXAMPLES / "cpu_clip.yaml")
    same = clip.objective.model_copy(update={"trust_region": troll.objective.trust_region})
    assert clip.model_copy(update={"name": troll.name, "objective": same}) == troll
    assert clip.objective.trust_region.name == "clip"


def test_training_starts_from_what_the_warm_start_exports():
    warm, troll = load(EXAMPLES / "cpu_warm_start.yaml"), load(EXAMPLES / "cpu_troll.yaml")
    assert troll.policy.path == f"{warm.runs}/{warm.name}/hf"
    assert (warm.policy.init, troll.policy.init) == ("random", "pretrained")


def test_the_recipe_of_a_real_model_is_judged_on_questions_that_taught_nothing():
    warm, troll = load(EXAMPLES / "lm_warm_start.yaml"), load(EXAMPLES / "lm_troll.yaml")
    answers, before, after = (load(EXAMPLES / f"lm_{name}.yaml") for name in ("answers", "before", "after"))
    assert troll.policy.path == before.policy.path == f"{warm.runs}/{warm.name}/hf"
    assert after.policy.path == f"{troll.runs}/{troll.name}/hf"
    assert after.eval == before.eval
    trained = troll.data.sources["names"]
    options = {"size": troll.data.held_out}
    assert all(of.gym == trained.gym.model_copy(update=options) for of in before.eval.values())
    assert all(
        of.instruction == trained.instruction for of in (*before.eval.values(), *answers.eval.values())
    )
    assert answers.eval["names"].gym.seed != trained.gym.seed == warm.data.sources["names"].gym.seed
