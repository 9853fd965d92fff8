"""`mtroll launch` refuses what the plan refuses, and writes nothing then."""

from pathlib import Path

import pytest

from megatron_troll.cli.main import main

EXAMPLES = Path(__file__).parents[4] / "examples" / "configs"


def launch(place: Path, *words: str) -> int:
    key = "rollout.sglang.api_key_file=key"
    options = ("--slurm", "--serve-nodes", "1", "--output", str(place / "job.sbatch"))
    return main(["launch", str(EXAMPLES / "qwen3_30b_a3b_troll.yaml"), key, *words, *options])


def test_what_fits_is_written_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "--nodes", "1") == 0
    assert capsys.readouterr().out.startswith("fits: stage 0 holds the most, ")
    assert "--gpus-per-node=8" in (tmp_path / "job.sbatch").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "1", "--gpus", "4"), "1 nodes of 4 ranks: models.policy: layout"),
        (("models.policy.recompute=none", "--nodes", "1"), "1 nodes of 8 GPUs: does not fit: stage 0 holds"),
        (
            ("launch.device_gib=80", "--nodes", "1"),
            "of 70.00 GiB (launch.device_gib 80 minus reserve_gib 10)",
        ),
        (
            ("rollout.sampling.max_tokens=99999", "--nodes", "1"),
            "exceeds the model's max_position_embeddings",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(tmp_path, *words) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_more_nodes_make_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(tmp_path, "launch.device_gib=80", "--nodes", "1") == 2
    assert launch(tmp_path, "launch.device_gib=80", "--nodes", "2") == 0
    capsys.readouterr()


def test_ranks_without_gpus_are_not_planned(tmp_path: Path) -> None:
    assert (
        launch(tmp_path, "models.policy.recompute=none", "--nodes", "1", "--gpus", "0", "--tasks", "8") == 0
    )


@pytest.mark.parametrize("wrong", ["--nodes=0", "--gpus=-8", "--serve-nodes=-1", "--notice-s=0"])
def test_numbers_that_are_none_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["launch", "c.yaml", "--slurm", "--nodes", "1", wrong])
    assert f"argument {wrong.partition('=')[0]}: invalid" in capsys.readouterr().err
