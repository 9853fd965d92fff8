"""The README's figure and table come from run folders."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_troll.observe.runs import read_run
from tools.plot_demo import KINDS, held_out, main


def make_run(root: Path, after: float, evaluated: list[int]) -> None:
    """Ten steps, with held-out success at those of `evaluated`."""
    root.mkdir(parents=True)
    rows = [{"step": 0, "held_out_success": 0.25}, *({"step": step, "success": 0.5} for step in range(1, 11))]
    for step in evaluated:
        rows[step]["held_out_success"] = after
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "summary.json").write_text(
        json.dumps({"held_out_success_before": 0.25, "held_out_success_after": after})
    )


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    """What examples/demo_seeds.sh leaves, for two seeds."""
    for seed in (0, 1):
        for number, kind in enumerate(KINDS):
            supervised = kind.folder == "more-warm-start"
            make_run(
                tmp_path / f"{seed}" / kind.folder,
                0.9 - 0.1 * number - 0.01 * seed,
                [] if supervised else [5, 10],
            )
    return tmp_path


def test_a_figure_and_its_table(seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(seeds), str(tmp_path / "curve.png")])
    assert imread(tmp_path / "curve.png").shape[:2] == (672, 1280)
    assert capsys.readouterr().out.splitlines() == [
        "| | seed 0 | seed 1 |",
        "|---|---|---|",
        "| warm start (before) | 0.250 | 0.250 |",
        "| RL, TROLL | 0.900 | 0.890 |",
        "| RL, PPO-clip | 0.800 | 0.790 |",
        "| control: more warm start | 0.700 | 0.690 |",
        "| control: RL with shuffled rewards | 0.600 | 0.590 |",
    ]


def test_supervised_runs_span_the_steps_of_rl(seeds: Path) -> None:
    assert held_out(read_run(seeds / "0" / "troll", "troll"), 10) == ([0, 5, 10], [0.25, 0.9, 0.9])
    more = read_run(seeds / "0" / "more-warm-start", "more")
    assert held_out(more, 10) == ([0, 10], [0.25, pytest.approx(0.7)])
