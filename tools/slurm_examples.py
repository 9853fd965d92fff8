"""Writes examples/slurm: what `mtroll launch` makes of the recipes. python tools/slurm_examples.py"""

from collections.abc import Sequence
from pathlib import Path

from megatron_troll.cli.main import parser
from megatron_troll.config.load import load
from megatron_troll.launch.slurm.cli import allocation_of
from megatron_troll.launch.slurm.script import check_memory, write

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "slurm"
CONTAINER = (
    "--container",
    "images/megatron-troll.sqsh",
    "--mounts",
    "/scratch:/scratch",
    "--python",
    "python3",
)
# SGLang is in the image's own Python.
IN_IMAGE = ("serve.python=python3",)
KEY = "rollout.sglang.api_key_file=runs/api-key"
COLOCATED = (
    "rollout.sglang.colocated=true",
    "serve.memory_fraction=0.5",
    "models.policy.optimizer.offload=1.0",
)
# Each script: its recipe, its overrides, its options.
JOBS = {
    "30b_a3b_disaggregated": ("qwen3_30b_a3b_troll", (KEY,), ("--nodes", "1", "--serve-nodes", "1")),
    "30b_a3b_colocated": ("qwen3_30b_a3b_troll", (KEY, *COLOCATED), ("--nodes", "1")),
    "80b_a3b_disaggregated": ("qwen3_next_80b_a3b_troll", (KEY,), ("--nodes", "2", "--serve-nodes", "1")),
    "80b_a3b_colocated": ("qwen3_next_80b_a3b_troll", (KEY, *COLOCATED), ("--nodes", "2")),
}


def scripts() -> dict[Path, str]:
    """Each file and its text. Raises ConfigError for a job that would not fit."""
    files = {}
    for name, (recipe, overrides, options) in JOBS.items():
        files[FOLDER / f"train_{name}.sbatch"] = script(recipe, overrides, options)
        files[FOLDER / f"train_{name}_container.sbatch"] = script(
            recipe, (*overrides, *IN_IMAGE), (*options, *CONTAINER)
        )
    return files


def script(recipe: str, overrides: Sequence[str], options: Sequence[str]) -> str:
    path = f"examples/configs/{recipe}.yaml"
    arguments = parser().parse_args(["launch", path, *overrides, "--slurm", *options])
    config, allocation = load(ROOT / path, overrides), allocation_of(arguments)
    check_memory(config, allocation)
    return write(config, path, overrides, allocation)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in scripts().items():
        file.write_text(text)
