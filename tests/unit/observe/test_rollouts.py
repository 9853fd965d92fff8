"""Stored rollouts can be read, listed and paged through, and stay small."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_troll.observe import browse
from megatron_troll.observe.rollouts import RolloutStore, read_step, step_of, stored_steps
from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.types import Message, Prompt, Rollout

WORDS = ("13", "57", "9", "</s>")


def rollout(sample: int, logp: list[float], mask: list[float] | None = None) -> Rollout:
    ids = np.arange(len(logp)) % len(WORDS)
    return Rollout(
        prompt=Prompt("sort-7", (Message("user", "sort 73915 <script>"),), "13579"),
        group=0,
        sample=sample,
        prompt_ids=np.arange(3),
        response_ids=ids,
        marks=np.asarray(mask or [1] * len(logp), np.int32),
        logp=np.asarray(logp, np.float32),
        key=0,
        topk=None,
        text="".join(WORDS[i] for i in ids),
        finish="stop",
        temperature=1.0,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps; the second one written by two data-parallel ranks."""
    folder = RunFolder(tmp_path / "demo").rollouts
    sure, unsure = rollout(0, [-0.01, -0.02, -0.0, -0.1]), rollout(1, [-0.5, -3.0], mask=[0.0, 1.0])
    RolloutStore(folder, WORDS.__getitem__).write(1, [sure], [1.0], [0.0])
    RolloutStore(folder, WORDS.__getitem__, 0, 2).write(2, [sure], [1.0], [0.70710678])
    RolloutStore(folder, WORDS.__getitem__, 1, 2).write(2, [unsure], [0.0], [-0.70710678])
    return tmp_path / "demo"


def listing(run: Path, **options) -> str:
    out = io.StringIO()
    browse.browse(run, Console(file=out, width=140), **options)
    return out.getvalue()


def test_samples_of_every_rank_are_read_back(run: Path) -> None:
    sure, unsure = read_step(run, 2)
    assert (sure.prompt, sure.sample, sure.reward, sure.advantage) == ("sort-7", 0, 1.0, 0.707107)
    assert sure.question == "user: sort 73915 <script>"
    assert unsure.tokens == ["13", "57"]
    assert unsure.logp == [-0.5, -3.0]
    assert unsure.mask == [0, 1]
    assert unsure.mean_logp == -3.0
    assert stored_steps(run) == [1, 2]


def test_a_step_written_again_replaces_the_old_one(run: Path) -> None:
    RolloutStore(RunFolder(run).rollouts, WORDS.__getitem__).write(1, [rollout(5, [-1.0])], [0.5], [0.0])
    assert [sample.sample for sample in read_step(run, 1)] == [5]


def test_rewards_must_match_rollouts(run: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        RolloutStore(RunFolder(run).rollouts, WORDS.__getitem__).write(3, [rollout(0, [-1.0])], [], [])
    assert stored_steps(run) == [1, 2]


def test_a_token_stays_small(tmp_path: Path) -> None:
    """Random words of a vocabulary of 5,000 and random log-probs: nothing there to compress."""
    random = np.random.default_rng(0)
    rollouts = [
        replace(rollout(i, list(-random.exponential(0.3, 1000))), response_ids=random.integers(0, 5000, 1000))
        for i in range(20)
    ]
    path = RolloutStore(tmp_path, lambda i: f" w{i * 7919:x}").write(1, rollouts, [0.0] * 20, [0.0] * 20)
    assert path.stat().st_size / 20_000 < 10


def test_listing_shows_the_last_step_sorted(run: Path) -> None:
    best_first = listing(run)
    assert "step 2 of 1-2: 2 rollouts" in best_first
    assert best_first.index("sort-7#0") < best_first.index("sort-7#1")
    worst_first = listing(run, sort="-reward")
    assert worst_first.index("sort-7#1") < worst_first.index("sort-7#0")
    assert "expected: 13579" in worst_first
    assert "least '57' -3.00" in worst_first
    assert "sort-7#1" not in listing(run, step=1)
    assert "sort-7#0" not in listing(run, sort="-logp", limit=1)


def test_a_listing_fits_a_narrow_terminal(run: Path) -> None:
    out = io.StringIO()
    browse.browse(run, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "\n  13579</s>\n" in out.getvalue()


def test_unlikely_tokens_are_warm_and_masked_ones_dim(run: Path) -> None:
    sure, unsure = read_step(run, 2)
    assert [str(span.style) for span in browse.shaded(unsure).spans] == ["dim", "bold red"]
    assert {str(span.style) for span in browse.shaded(sure).spans} == {"default"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"step": 9}, "no rollouts of step 9; it has steps 1 to 2"), ({"sort": "luck"}, "reward, advantage")],
)
def test_wrong_requests_name_what_there_is(run: Path, options: dict, message: str) -> None:
    with pytest.raises(RunFolderError, match=message):
        listing(run, **options)


def test_a_run_without_rollouts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"observe\.rollouts=true"):
        listing(tmp_path)


def page_data(page: Path) -> dict:
    found = re.search(r"^const data = (.*);$", page.read_text(), re.MULTILINE)
    assert found
    return json.loads(found.group(1))


def test_page_holds_every_sample_and_nothing_from_elsewhere(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "rollouts.html"
    browse.html(run, page)
    data = page_data(page)
    assert [(s["step"], s["sample"]) for s in data["samples"]] == [(1, 0), (2, 0), (2, 1)]
    assert data["samples"][2]["logp"] == [-0.5, -3.0]
    assert "sort 73915 <script>" not in page.read_text()
    assert not re.search(r"(src|href)=|https?://", page.read_text())


def test_a_long_run_is_thinned_and_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browse, "PAGE_TOKENS", 5)
    browse.html(run, tmp_path / "rollouts.html")
    data = page_data(tmp_path / "rollouts.html")
    assert (len(data["samples"]), data["total"]) == (2, 3)


def test_an_emptied_file_is_damaged_and_holds_no_step_without_rollouts(run: Path) -> None:
    emptied = sorted((run / "rollouts").glob("*.gz"))[0]
    emptied.write_bytes(b"")
    with pytest.raises(RunFolderError, match=f"{emptied.name}: damaged after line 0: it is empty"):
        list(read_step(run, step_of(emptied) or 0))


def test_a_step_without_the_file_of_a_rank_is_not_read_as_a_whole_one(run: Path) -> None:
    (run / "rollouts" / "step_000002.0-of-2.jsonl.gz").unlink()
    with pytest.raises(RunFolderError, match=r"step_000002\.0-of-2\.jsonl\.gz is missing"):
        list(read_step(run, 2))
