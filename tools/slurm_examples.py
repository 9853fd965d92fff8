"""Writes examples/slurm: what `mtroll launch` makes of the recipes. python tools/slurm_examples.py"""

from pathlib import Path

from megatron_troll.cli import parser
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
JOBS = {
    "qwen3_30b_a3b_troll": ("qwen3_30b_a3b_troll", "--nodes", "1"),
    "qwen3_30b_a3b_troll_container": ("qwen3_30b_a3b_troll", "--nodes", "1", *CONTAINER),
    "qwen3_next_80b_a3b_troll": ("qwen3_next_80b_a3b_troll", "--nodes", "2"),
    "qwen3_next_80b_a3b_troll_container": ("qwen3_next_80b_a3b_troll", "--nodes", "2", *CONTAINER),
}


def scripts() -> dict[Path, str]:
    """Each file and its text. Raises ConfigError for a job that would not fit."""
    return {FOLDER / f"{name}.sbatch": script(recipe, options) for name, (recipe, *options) in JOBS.items()}


def script(recipe: str, options: list[str]) -> str:
    path = f"examples/configs/{recipe}.yaml"
    arguments = parser().parse_args(["launch", path, "--slurm", *options])
    config, allocation = load(ROOT / path), allocation_of(arguments)
    check_memory(config, allocation)
    return write(config, path, [], allocation)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in scripts().items():
        file.write_text(text)
