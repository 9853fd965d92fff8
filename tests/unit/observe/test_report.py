"""A report compares runs in one page that needs no network."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_troll.observe.report import report
from megatron_troll.observe.run_folder import RunFolderError
from megatron_troll.observe.runs import NoMetricsError, differing_keys, read_runs

CONFIG = "seed: 0\nobjective: {{trust_region: {{name: troll, bound: {bound}}}}}\n"
SUMMARY = {
    "held_out_success_before": 0.25,
    "held_out_success_after": 0.875,
    "seconds": 61.5,
    "seed": 0,
    "versions": {"torch": "2.8.0"},
}


def make_run(root: Path, bound: float, finished: bool = True) -> Path:
    """Five steps; KL missing in the third, held-out success in the last only."""
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(CONFIG.format(bound=bound))
    rows = [
        {"step": step, "success": step / 10, "kl_before": bound * step, "seconds/generation": 2.0}
        for step in range(1, 6)
    ]
    rows[4]["held_out_success"] = 0.875
    rows[2]["kl_before"] = None
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (root / "summary.json").write_text(json.dumps(SUMMARY))
    return root


def test_two_runs_in_one_page(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "tight", 0.01), make_run(tmp_path / "<loose>", 0.5, finished=False)]
    report(runs, tmp_path / "out" / "report.html")
    html = (tmp_path / "out" / "report.html").read_text()
    for text in ("0.875", "61.5", "torch 2.8.0", "5 (not finished)", "objective.trust_region.bound"):
        assert text in html
    assert "<td>seed</td>" not in html
    assert "<loose></h1>" not in html
    assert "&lt;loose&gt;</h1>" in html
    assert '"held out' not in html
    assert '"name":"tight, held out"' in html
    assert '"y":[0.01,0.02,0.04,0.05]' in html


def test_page_holds_plotly_once_and_loads_nothing(tmp_path: Path) -> None:
    report([make_run(tmp_path / "one", 0.05)], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert html.count("plotly.js v") == 1
    assert not re.search(r"<script[^>]*\ssrc=|<link[^>]*\shref=", html)


def test_curves_are_a_picture_of_readable_size(tmp_path: Path) -> None:
    report([make_run(tmp_path / "one", 0.05), make_run(tmp_path / "two", 0.1)], tmp_path / "report.html")
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert (height, width) == (1024, 1600)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "succ'])
def test_a_run_without_metrics_is_an_error(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "young").mkdir()
    if content is not None:
        (tmp_path / "young" / "metrics.jsonl").write_text(content)
    with pytest.raises(NoMetricsError, match="young has no metrics yet"):
        report([tmp_path / "young"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    root = make_run(tmp_path / "one", 0.05)
    with open(root / "metrics.jsonl", "a") as file:
        file.write("oops\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 6: not JSON"):
        read_runs([root])


def test_runs_of_one_name_are_told_apart_by_path(tmp_path: Path) -> None:
    roots = [make_run(tmp_path / "a" / "demo", 0.05), make_run(tmp_path / "b" / "demo", 0.05)]
    assert [run.name for run in read_runs(roots)] == [str(root) for root in roots]
    assert differing_keys(read_runs(roots)) == {}
