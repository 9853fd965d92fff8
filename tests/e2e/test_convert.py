"""`mtroll convert` as a user types it: a run's checkpoint, ranks of torchrun, training from the result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.mcore.checkpoint_sums import read_sums, sums_of, write_sums
from megatron_troll.weights.source import FolderSource
from megatron_troll.weights.torch_dist import SavedTensors
from tests.e2e.workplace import Done, Workplace, finish, succeed, two_steps, untimed

STEP = "runs/finished/checkpoints/step_000004"


@pytest.fixture(scope="module")
def converted(finished: Workplace) -> Workplace:
    """The finished run's export as a Megatron checkpoint, in `mcore`."""
    succeed(finished.mtroll("convert", "hf2mcore", "runs/finished/hf", "mcore", "--shard-gib", "0.0005"))
    return finished


def same_tensors(one: Path, other: Path) -> bool:
    first, second = FolderSource(one), FolderSource(other)
    same = all(first.read(name).equal(second.read(name)) for name in first.shapes)
    return first.shapes == second.shapes and same


def test_a_checkpoint_of_a_run_converts_to_what_the_run_exported(finished: Workplace) -> None:
    done = succeed(finished.mtroll("convert", "mcore2hf", STEP, "step4", "--verify"))
    assert "wrote step4" in done.out
    assert "the same model: logits of 4 prompts of 32 tokens differ by at most" in done.out
    assert same_tensors(finished.root / "step4", finished.run("finished") / "hf")
    again = succeed(finished.mtroll("convert", "mcore2hf", STEP, "step4"))
    assert "step4 exists already, written by the same conversion" in again.out


def test_weights_that_changed_do_not_verify(finished: Workplace) -> None:
    words = ("convert", "hf2mcore", "runs/finished/hf", "changed")
    succeed(finished.mtroll(*words))
    tensors = SavedTensors(finished.root / "changed" / "tensors")
    (chunk,) = tensors.tensors["embedding.word_embeddings.weight"].chunks
    with open(finished.root / "changed" / "tensors" / chunk.file, "r+b") as file:
        file.seek(chunk.offset + chunk.length // 2)
        file.write(bytes(1000))
    done = finished.mtroll(*words, "--verify")
    assert done.code == 2
    assert f"{chunk.file}: not as changed/SHA256SUMS says" in done.err[-1]
    listed = read_sums(finished.root / "changed") or {}
    write_sums(finished.root / "changed", sums_of(finished.root / "changed", listed))
    done = finished.mtroll(*words, "--verify")
    assert done.code == 1
    assert "NOT the same model" in done.out


def test_ranks_share_the_work_and_write_the_same(converted: Workplace) -> None:
    done = torchrun(converted, "convert", "hf2mcore", "runs/finished/hf", "ranks", "--shard-gib", "0.0005")
    assert done.code == 0, done.err
    assert sums(converted.root / "ranks") == sums(converted.root / "mcore")


def sums(folder: Path) -> dict[str, str]:
    """Of the files with tensors."""
    lines = (line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines())
    return {name: digest for digest, name in lines if name.endswith(".distcp")}


def torchrun(place: Workplace, *arguments: str) -> Done:
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_troll.cli",
        *arguments,
    ]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=place.root,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finish(process)


def test_training_from_a_converted_folder_is_training_from_the_original(converted: Workplace) -> None:
    reference = "objective.kl={name: k3, beta: 0.1}"
    rows = {
        path: two_steps(
            converted,
            f"from-{path.replace('/', '-')}",
            reference,
            f"models.policy.path={path}",
            f"models.reference={{path: {path}}}",
        )
        for path in ("mcore", "runs/finished/hf")
    }
    assert untimed(rows["mcore"]) == untimed(rows["runs/finished/hf"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hf2mcore", "nowhere", "x"), "nowhere/config.json not found"),
        (("mcore2hf", "runs/finished", "x", "--like", "runs/finished/hf"), "give one step of a run"),
        (("hf2mcore", "runs/finished/hf", "runs/demo"), "runs/demo is not empty"),
        (("hf2mcore", "runs/finished/hf", "x", "--shard-gib", "0"), "a size above 0 is needed"),
    ],
)
def test_refusals_exit_with_2_and_one_line(words: tuple[str, ...], message: str, finished: Workplace) -> None:
    done = finished.mtroll("convert", *words)
    assert done.code == 2
    assert message in done.err[-1]
    assert not (finished.root / "x").exists()
