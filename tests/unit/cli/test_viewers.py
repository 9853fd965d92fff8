"""`mtroll report` and `mtroll rollouts` on damaged run folders and odd arguments: one line, exit code 2."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_troll.cli.main import main

ROW = {"step": 1, "loss": 0.5, "held_out_success": 0.25, "seconds": 1.0, "seconds/generation": 0.5}
SUMMARY = {"held_out_success_before": 0.1, "held_out_success_after": 0.2, "seconds": 9.0, "seed": 0}
SAMPLE = {
    "step": 1,
    "prompt": "p",
    "sample": 0,
    "question": "user: q",
    "answer": "a",
    "text": "ab",
    "reward": 1.0,
    "advantage": 0.0,
    "finish": "stop",
    "tokens": ["a", "b"],
    "logp": [-0.1, -0.2],
    "mask": [1, 1],
}


def write_run(root: Path) -> Path:
    (root / "rollouts").mkdir(parents=True)
    (root / "metrics.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"step": 2}) + "\n")
    (root / "summary.json").write_text(json.dumps(SUMMARY | {"versions": {"torch": "2"}}))
    (root / "config.yaml").write_text("name: run\nseed: 0\n")
    write_sample(root, SAMPLE)
    return root


def write_sample(root: Path, sample: object) -> None:
    line = json.dumps(sample) + "\n"
    (root / "rollouts" / "step_000001.0-of-1.jsonl.gz").write_bytes(gzip.compress(line.encode()))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_a_whole_folder_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert main(["rollouts", str(run)]) == 0
    assert "p#0: reward 1" in capsys.readouterr().out


DAMAGED = {
    "metrics.jsonl": [
        b"oops\n",
        b"[1]\n",
        b"null\n",
        b"{}\n",
        b'{"step": "1"}\n',
        b'{"step": true}\n',
        b'{"step": 1e3}\n',
        b'{"step": 1, "loss": "x"}\n',
        b'{"step": 1, "loss": [1]}\n',
        b'{"step": 1, "loss": {}}\n',
        b'{"step": ' + b"9" * 30 + b"}\n",
        b'{"step": 1, "loss": ' + b"9" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b"\x00\x00\n",
    ],
    "summary.json": [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"versions": [1]}',
        b'{"seconds": "x"}',
        b'{"seed": []}',
        b'{"held_out_success_before": {}}',
    ],
    "config.yaml": [
        b"[1]",
        b"a: [",
        b"a: &a [*a]",
        b"\xff\xfe\x00",
        b"a: !!python/object:os.system x",
        b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 106)),
        b"seed: " + b"[" * 9000,
    ],
}


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, many in DAMAGED.items() for one in many])
def test_a_damaged_file_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    (run / name).write_bytes(content)
    assert name in refused(capsys, "report", run)


@pytest.mark.parametrize("name", [*DAMAGED])
@pytest.mark.parametrize("kind", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(run: Path, capsys: pytest.CaptureFixture[str], name: str, kind) -> None:
    (run / name).unlink()
    kind(run / name)
    assert name in refused(capsys, "report", run)


def damaged_samples() -> list[object]:
    odd: list[object] = [None, [1], {}, SAMPLE | {"more": 1}]
    odd += [{key: value for key, value in SAMPLE.items() if key != gone} for gone in ("tokens", "reward")]
    odd += [SAMPLE | {key: None} for key in SAMPLE]
    odd += [SAMPLE | {"tokens": ["a"]}, SAMPLE | {"tokens": [1, 2]}, SAMPLE | {"logp": ["x", "y"]}]
    return odd


@pytest.mark.parametrize("sample", damaged_samples())
@pytest.mark.parametrize("page", [False, True])
def test_a_damaged_rollout_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], sample: object, page: bool
) -> None:
    write_sample(run, sample)
    more = ["--html", run / "page.html"] if page else []
    assert "step_000001.0-of-1.jsonl.gz: damaged after line 0: " in refused(capsys, "rollouts", run, *more)
    assert not (run / "page.html").exists()


@pytest.mark.parametrize(
    "content", [b"", b"text", gzip.compress(b"{}\n" * 999, mtime=0)[:-20], b"\x1f\x8b\x08\x00"]
)
def test_a_damaged_archive_is_named(run: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (run / "rollouts" / "step_000001.0-of-1.jsonl.gz").write_bytes(content)
    assert "step_000001.0-of-1.jsonl.gz: damaged after line 0" in refused(capsys, "rollouts", run)


def test_a_rollout_file_of_an_odd_name_is_not_one_of_the_run(run: Path) -> None:
    (run / "rollouts" / "step_x.jsonl.gz").write_bytes(b"")
    assert main(["rollouts", str(run)]) == 0


def test_control_characters_of_an_answer_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"question": "\x1b[2J", "prompt": "\x1b]0;x\x07", "tokens": ["\x1b", "[31m"], "finish": "\x9b"}
    write_sample(run, SAMPLE | hostile)
    assert main(["rollouts", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert "\\x1b[31m" in out
    assert not any(mark in out for mark in ("\x1b", "\x07", "\x9b"))


def test_odd_arguments_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a folder" in refused(capsys, "report", run, "--output", run)
    assert "is a folder" in refused(capsys, "rollouts", run, "--html", run)
    assert "is a file" in refused(capsys, "report", run / "summary.json")
    assert "holds no rollouts" in refused(capsys, "rollouts", run / "summary.json")
    assert "no rollouts of step 7" in refused(capsys, "rollouts", run, "--step", "7")
    assert "cannot sort rollouts by 'x'" in refused(capsys, "rollouts", run, "--sort", "x")
    refused(capsys, "report", run, "--output", run / "summary.json" / "page.html")
    refused(capsys, "rollouts", run, "--html", "/proc/page.html")
    assert "mtroll methods: no slot 'x'" in refused(capsys, "methods", "x")


def test_the_demo_overwrites_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(run.rglob("*"))
    assert "exists already" in refused(capsys, "demo", run)
    assert "exists already" in refused(capsys, "demo", run / "summary.json")
    assert sorted(run.rglob("*")) == before
