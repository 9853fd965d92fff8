"""What the command line does before any run: help without heavy imports, refusals without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.cli.main import main, parser

HEAVY = ("torch", "transformers", "megatron.core")


def test_help_and_typing_errors_load_nothing_heavy() -> None:
    script = f"""
import sys
from megatron_troll.cli.main import main, parser
try:
    main(["--help"])
except SystemExit as end:
    sys.exit(str([name for name in {HEAVY} if name in sys.modules]) if end.code == 0 else "failed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
    for command in ("train", "sft", "eval", "demo", "report", "rollouts"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("module", "without"),
    [("megatron_troll.checks", "megatron.core"), ("megatron_troll.cli.commands", "torch")],
)
def test_what_refuses_and_starts_ranks_imports_little(module: str, without: str) -> None:
    script = f"import sys, {module}; print({without!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory\n"),
        (["report", "nowhere"], "nowhere has no metrics yet"),
        (["rollouts", "nowhere"], "nowhere holds no rollouts"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "launch c.yaml a=1 b=2 --slurm --nodes 2 --mounts /x:/x",
        "launch --slurm --nodes 2 c.yaml a=1 --mounts /x:/x b=2",
        "launch c.yaml --slurm --mounts /x:/x a=1 --nodes 2 b=2",
    ],
)
def test_options_and_overrides_come_in_any_order(line: str) -> None:
    arguments = parser().parse_args(line.split())
    assert (arguments.config, arguments.overrides) == ("c.yaml", ["a=1", "b=2"])
    assert (arguments.nodes, arguments.mounts) == (2, ["/x:/x"])


@pytest.mark.parametrize(
    "line",
    [
        "plan c.yaml --json a=1",
        "preflight --serve-nodes 1 c.yaml a=1",
        "study kl c.yaml --k 1,2 a=1",
        "train c.yaml a=1",
    ],
)
def test_so_they_do_for_every_command_with_overrides(line: str) -> None:
    arguments = parser().parse_args(line.split())
    assert (arguments.config, arguments.overrides) == ("c.yaml", ["a=1"])


def test_an_option_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        ("train c.yaml --nodes 2 a=1", "unrecognized arguments: --nodes"),
        ("train", "the following arguments are required: config"),
        ("launch c.yaml --slurm a=1", "the following arguments are required: --nodes"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser().parse_args(line.split())
        assert capsys.readouterr().err.splitlines()[-1].partition("error: ")[2].startswith(said)


def test_a_folder_is_run_from_the_config_it_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: again\nmodles: {}\n")
    assert main(["train", str(tmp_path)]) == 2
    assert f"({tmp_path / 'config.yaml'} line 2)" in capsys.readouterr().err
