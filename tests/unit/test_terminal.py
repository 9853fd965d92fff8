"""Control characters reach the terminal as text."""

import io
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from megatron_troll.observe.progress import open_progress
from megatron_troll.terminal import ShowingStream, shown


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\tb\nc \u00e9 \u65e5", "a\tb\nc \u00e9 \u65e5"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("over\rwritten\b\x7f", "over\\x0dwritten\\x08\\x7f"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eltr\u2066", "\\u202eltr\\u2066"),
        ("\ud83d", "\\ud83d"),
    ],
)
def test_control_characters_are_shown(text: str, seen: str) -> None:
    assert shown(text) == seen
    stream = io.StringIO()
    showing = cast(io.StringIO, ShowingStream(stream))
    assert showing.write(text) == len(text)
    showing.writelines([text, "."])
    assert stream.getvalue() == seen * 2 + "."


def test_progress_shows_them() -> None:
    out = io.StringIO()
    open_progress(Console(file=out), 1, "run").say("broken: \x1b[2J")
    assert out.getvalue() == "broken: \\x1b[2J\n"


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    return done.stderr.decode()


def test_errors_of_a_command_show_what_files_hold(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('"na\\e[31mme": x\n')
    said = run(f"from megatron_troll.cli.main import main; main(['train', {str(tmp_path / 'run.yaml')!r}])")
    assert "na\\x1b[31mme: unknown key" in said
    assert "\x1b" not in said


def test_so_does_a_traceback() -> None:
    said = run(
        "from megatron_troll.cli import main as at\n"
        "at.commands.methods = None\n"
        "def fail(arguments): raise RuntimeError('x\\x1b[31m')\n"
        "at.commands.methods = fail\n"
        "at.main(['methods'])"
    )
    assert "RuntimeError: x\\x1b[31m" in said
    assert "\x1b" not in said
