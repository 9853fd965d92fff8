"""The scripts of a dry run, and what is refused before there are any."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_troll.launch.slurm.script import BODY
from tests.e2e.workplace import REPOSITORY
from tests.house.markdown import commands
from tests.nemo.conftest import LAUNCH, PYTHON

CONFIG = str(REPOSITORY / "examples" / "configs" / "cpu_troll.yaml")
GOLDEN = Path(__file__).with_name("golden")
CPU = ("--gpus", "0", "--tasks", "2", "--dryrun")
DRY = {
    "local": ("local", CONFIG, "train.steps=3", "--nodes", "1", *CPU),
    "slurm": ("slurm", CONFIG, "--nodes", "2", *CPU),
    "slurm_container": (
        *(
            "slurm",
            CONFIG,
            "name='it''s a \"run\"'",
            "--nodes",
            "2",
            "--partition",
            "gpu",
            "--account",
            "lab",
        ),
        *("--time", "4:00:00", "--notice-s", "300", "--cpus", "12", "--interface", "ib0", "--restarts", "5"),
        *("--container", "/images/a b.sqsh", "--mounts", "/my data:/data", "--python", "python3", "--dryrun"),
    ),
    "slurm_serving": (
        *("slurm", CONFIG, "--nodes", "2", "--serve-nodes", "1", "--dryrun"),
        *("rollout.engine=sglang", "rollout.sglang.api_key_file=runs/api-key", "serve={servers: 4, tp: 2}"),
    ),
    "docker": (
        *("docker", CONFIG, "--nodes", "1", "--container", "megatron-troll:0.1.0", "--python", "python3"),
        *("--mounts", "/data:/data", "--dryrun"),
    ),
}
REFUSED = {
    "local: --nodes 2: this executor starts ranks on one node": ("local", CONFIG, "--nodes", "2", *CPU),
    "local: --partition means nothing to this executor": (
        *("local", CONFIG, "--nodes", "1", "--partition", "gpu", *CPU),
    ),
    "docker: --notice-s means nothing to this executor": (
        *("docker", CONFIG, "--nodes", "1", "--container", "image", "--notice-s", "9", *CPU),
    ),
    "docker: --container is missing": ("docker", CONFIG, "--nodes", "1", *CPU),
    "slurm: 1 nodes of 8 ranks: models.policy: ": (
        *("slurm", CONFIG, "models.policy.layout={tp: 4, pp: 3, ep: 4}", "--nodes", "1", "--dryrun"),
    ),
    "slurm: serve.servers=4 x serve.tp=4 = 16 GPUs of each node that serves, which has 8": (
        *("slurm", CONFIG, "rollout.engine=sglang", "rollout.sglang.api_key_file=runs/api-key"),
        *("serve={servers: 4, tp: 4}", "--nodes", "1", "--serve-nodes", "1", "--dryrun"),
    ),
    "slurm: rollout.engine=sglang: nobody serves": (
        *("slurm", CONFIG, "rollout.engine=sglang", "--nodes", "1", *CPU),
    ),
    "local: --serve-nodes means nothing to this executor": (
        *("local", CONFIG, "--nodes", "1", "--serve-nodes", "1", *CPU),
    ),
    "slurm: train.step: unknown key; did you mean 'steps'?": (
        *("slurm", CONFIG, "train.step=3", "--nodes", "1", *CPU),
    ),
    "slurm: a path holds /nemo_run": ("slurm", CONFIG, "runs=/data/nemo_run", "--nodes", "1", *CPU),
    "local: NEMORUN_HOME is '/a b'": ("local", CONFIG, "--nodes", "1", *CPU),
}
# Several command lines in one process: importing nemo-run takes seconds.
DRIVER = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
import launch
from nemo_run.config import set_nemorun_home
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    set_nemorun_home("/a b" if "/a b" in name else os.path.abspath("home"))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = launch.main(arguments)
    said[name] = (code, out.getvalue(), err.getvalue())
json.dump(said, open("said.json", "w"))
"""


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def scripts(self) -> dict[str, str]:
        """By name."""
        parts = re.split(r"^# (/\S+)\n", self.out, flags=re.MULTILINE)
        return {Path(path).name: text for path, text in zip(parts[1::2], parts[2::2])}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, Said]:
    """What each command line of DRY and REFUSED said, in `place`."""
    lines = {name: list(words) for name, words in {**DRY, **REFUSED}.items()}
    command = [PYTHON, "-c", DRIVER, json.dumps(lines)]
    path = f"{LAUNCH.parent}:{REPOSITORY}"
    done = subprocess.run(
        command, cwd=place, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {name: Said(*each) for name, each in json.loads((place / "said.json").read_text()).items()}


def normal(text: str, place: Path) -> str:
    """Without what differs from one dry run to the next, and without train.sh, which is not made here."""
    assert text.count(BODY.read_text()) in (0, 1)
    text = text.replace(BODY.read_text(), "(train.sh)\n").replace(str(place), "PLACE")
    text = re.sub(r"_\d{19}\b", "_ID", text.replace(str(REPOSITORY), "REPOSITORY"))
    return re.sub(r"user: \d+:\d+", "user: UID:GID", text)


@pytest.mark.parametrize("name", DRY)
def test_the_scripts_are_the_golden_ones(said: dict[str, Said], place: Path, name: str) -> None:
    assert said[name].code == 0, said[name].err
    assert normal(said[name].out, place) == (GOLDEN / f"{name}.txt").read_text()
    assert not any((place / "home" / "experiments").glob("*/*")), "a dry run leaves nothing behind"


@pytest.mark.parametrize("name", DRY)
def test_bash_and_shellcheck_have_nothing_against_them(
    said: dict[str, Said], tmp_path: Path, name: str
) -> None:
    """nemo-run's own batch script has its style; errors would count. It calls srun before we define ours."""
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    scripts = {file: text for file, text in said[name].scripts.items() if file.endswith(".sh")}
    assert scripts
    for file, text in scripts.items():
        path = tmp_path / file
        path.write_text(text)
        own = (
            ["--severity=error", "--exclude=SC2218"] if file.endswith("_sbatch.sh") else ["--exclude=SC2016"]
        )
        for command in (["bash", "-n"], [shellcheck, *own]):
            done = subprocess.run([*command, str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_run_is_refused_before_nemo_run_sees_it(said: dict[str, Said], reason: str) -> None:
    assert (said[reason].code, said[reason].out) == (2, "")
    assert said[reason].err.startswith(reason.partition(": ")[2])


def test_the_commands_of_the_page_are_understood() -> None:
    lines = [
        words[2:]
        for words in commands(REPOSITORY / "docs" / "nemo-run.md")
        if words[1:2] == [str(LAUNCH.relative_to(REPOSITORY))]
    ]
    assert len(lines) == 4
    code = "import json, launch, sys; parse = launch.parser().parse_intermixed_args\n"
    code += "for line in json.loads(sys.argv[1]): parse(line)"
    done = subprocess.run(
        [PYTHON, "-c", code, json.dumps(lines)], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
