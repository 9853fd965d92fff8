"""docs/plan.md says what `mtroll plan` says of the presets, and names every recipe."""

from pathlib import Path

import pytest

from megatron_troll.config import Config
from megatron_troll.config.document import parse
from megatron_troll.config.load import PRESETS, assemble, read
from megatron_troll.launch.plan.build import GIB, plan
from tests.house.markdown import ROOT, configurations

PAGE = (ROOT / "docs" / "plan.md").read_text()
LAYOUTS = sorted(PRESETS.glob("qwen3_*.yaml"))
RECIPES = sorted((ROOT / "examples" / "configs").glob("qwen3_*.yaml"))
RUN = "name: run\ndata: {files: [prompts.jsonl]}"


def row(config: Config, name: str) -> str:
    found, policy = plan(config), config.policy
    sizes = {axis: size for axis, size in policy.layout.model_dump().items() if size not in (1, None)}
    layout = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
    again = "experts" if policy.recompute == "selective" else policy.recompute
    return f"| `{name}` | {found.world} | `{{{layout}}}` | {again} | {found.worst.total / GIB:.0f} |"


@pytest.mark.parametrize("preset", LAYOUTS, ids=lambda path: path.stem)
def test_a_preset_is_in_the_table_as_it_is_planned(preset: Path) -> None:
    config = assemble([read(preset), read(PRESETS / "troll.yaml"), parse(RUN, "run")])
    assert row(config, preset.stem) in PAGE


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named(recipe: Path) -> None:
    assert f"`{recipe.stem}`" in PAGE


def test_the_example_of_the_readme_fits(tmp_path: Path) -> None:
    (example,) = configurations(ROOT / "README.md", tmp_path)
    assert plan(example).fits
