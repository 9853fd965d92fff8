"""Write examples/slurm: a job script as `mtroll launch` writes it, and the commands of the others, which
differ from it only in their header. python tools/slurm_examples.py"""

from collections.abc import Sequence
from pathlib import Path
from shlex import join

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


SHOWN = "30b_a3b_disaggregated"
README = """# Job scripts

`train_{shown}.sbatch` is what the first command writes. The other scripts differ from it
only in their header: models, nodes, servers on nodes of their own or on the same GPUs, bare-metal or in
a container. Run each command, one line, in the root of the project. Made by `tools/slurm_examples.py`.
"""


def jobs() -> dict[str, list[str]]:
    """The arguments of `mtroll launch` for each script: a recipe, its overrides and options."""
    found = {}
    for name, (recipe, overrides, options) in JOBS.items():
        path = f"examples/configs/{recipe}.yaml"
        found[name] = [path, *overrides, "--slurm", *options]
        found[f"{name}_container"] = [path, *overrides, *IN_IMAGE, "--slurm", *options, *CONTAINER]
    return found


def script(arguments: Sequence[str]) -> str:
    """The job script for `arguments`. Raises ConfigError for a job that would not fit."""
    asked = parser().parse_args(["launch", *arguments])
    config, allocation = load(ROOT / asked.config, asked.overrides), allocation_of(asked)
    check_memory(config, allocation)
    return write(config, asked.config, asked.overrides, allocation)


def files() -> dict[Path, str]:
    """Each file of examples/slurm and its text."""
    commands = [f"## {name}\n\n```sh\nmtroll launch {join(job)}\n```\n" for name, job in jobs().items()]
    return {
        FOLDER / f"train_{SHOWN}.sbatch": script(jobs()[SHOWN]),
        FOLDER / "README.md": "\n".join([README.format(shown=SHOWN), *commands]),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in files().items():
        file.write_text(text)
