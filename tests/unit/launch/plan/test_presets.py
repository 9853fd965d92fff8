"""The presets of published models and the recipes over them: their totals, and whether they fit."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_troll.checks import check_length
from megatron_troll.config import Config
from megatron_troll.config.load import PRESETS, load
from megatron_troll.launch.plan.build import Plan, plan
from megatron_troll.launch.plan.models import PUBLISHED, shape_at
from megatron_troll.weights.families import table_of
from megatron_troll.weights.table import parameters_of

EXAMPLES = Path(__file__).parents[4] / "examples" / "configs"
RECIPES = sorted(EXAMPLES.glob("qwen3_*.yaml"))
LAYOUTS = {
    name: PRESETS / f"{name}.yaml" for name in sorted(path.stem for path in PRESETS.glob("qwen3_*.yaml"))
}
MODELS = sorted(path.name for path in PUBLISHED.iterdir())


def run_of(preset: str, place: Path) -> Config:
    path = place / "run.yaml"
    path.write_text(f"extends: [{preset}, troll]\nname: run\ndata: {{files: [prompts.jsonl]}}\n")
    return load(path)


@pytest.mark.parametrize("name", MODELS)
def test_a_total_is_that_of_hugging_face(name: str) -> None:
    sizes = json.loads((PUBLISHED / name / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    assert parameters_of(table_of(shape_at("path", name))) == sum(p.numel() for p in model.parameters())


def test_the_total_of_30b_a3b_is_the_published_one(tmp_path: Path) -> None:
    assert plan(run_of("qwen3_30b_a3b", tmp_path)).parameters[0].total == 30_532_122_624


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_recommended_layout_fits_the_gpus_it_is_for(name: str, tmp_path: Path) -> None:
    found = plan(run_of(name, tmp_path))
    named = name.rsplit("_", 1)[1]
    assert found.world == (int(named) if named.isdigit() else 8)
    assert found.fits


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "80b" in name])
def test_the_80b_presets_plan_the_whole_context(name: str, tmp_path: Path) -> None:
    found = plan(run_of(name, tmp_path))
    assert found.work.tokens + 1 == shape_at("path", "Qwen3-Next-80B-A3B-Instruct").max_positions == 2**18
    assert found.work.micro_tokens == 2**18


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits(path: Path) -> None:
    config = load(path)
    found = plan(config)
    assert found.fits
    shape = shape_at("models.policy.path", config.policy.path)
    for name, one in config.eval.items():
        assert one.sampling.max_tokens >= min(config.rollout.sampling.max_tokens, 2**14)
        check_length({name: one.max_prompt_tokens + one.sampling.max_tokens}, shape)


def test_baselines_have_the_budget_of_troll() -> None:
    troll = load(EXAMPLES / "qwen3_30b_a3b_troll.yaml")
    for name in ("grpo", "dr_grpo", "gspo", "ppo"):
        baseline = load(EXAMPLES / f"qwen3_30b_a3b_{name}.yaml")
        assert (baseline.rollout, baseline.train, baseline.data) == (troll.rollout, troll.train, troll.data)
        assert baseline.policy == troll.policy
        assert baseline.objective != troll.objective


def test_warm_up_of_dfpo_is_3_percent() -> None:
    config = load(EXAMPLES / "qwen3_next_80b_a3b_dfpo.yaml")
    assert config.policy.optimizer.schedule.warmup_steps == 0.03 * config.train.steps * config.train.updates


class NothingReal(TorchDispatchMode):
    """Fails where a tensor has memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        assert not torch.is_tensor(made) or made.device.type == "meta", func
        return made


def test_a_plan_allocates_nothing(tmp_path: Path) -> None:
    with NothingReal():
        found: Plan = plan(run_of("qwen3_next_80b_a3b_64", tmp_path))
    assert found.world == 64
