"""Every case of every golden file that the product implements (golden/README.md).

The folder is the environment variable GOLDEN_DIR, or tests/golden. A file is run by the runner of its
name in tests/unit/golden/; files of methods that are not implemented yet are listed in PENDING.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.unit.golden import troll_objective, troll_projection, troll_sparsify
from tests.unit.golden.runner import differences

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
RUNNERS = {
    "troll_sparsify": troll_sparsify.RUNNER,
    "troll_projection": troll_projection.RUNNER,
    "troll_objective": troll_objective.RUNNER,
}
PENDING = (
    "baseline_masks",
    "cppo_masks",
    "dfpo",
    "grpo_fix",
    "gspo",
    "jackpot",
    "k_estimators",
    "misc",
    "tike",
    "troll_x_cppo",
)


def _cases() -> list:
    found = []
    for name in RUNNERS:
        path = FOLDER / f"{name}.json"
        cases = json.loads(path.read_text())["cases"] if path.exists() else []
        for index, case in enumerate(cases):
            found.append(pytest.param(name, case, id=f"{name}-{case.get('name', index)}"))
    return found


CASES = _cases()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("file", "case"), CASES)
def test_case(file, case, dtype):
    runner = RUNNERS[file]
    if "expect_error" in case:
        with pytest.raises(ValueError, match=r"\w"):
            runner.run(case, dtype)
        return
    compared, wrong = differences(runner, case, dtype)
    assert not wrong, "\n".join(wrong)
    assert compared > 0


def test_every_file_is_known_or_pending():
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files & RUNNERS.keys(), f"no golden file that has a runner in {FOLDER}"
    assert files <= RUNNERS.keys() | set(PENDING)
    assert not RUNNERS.keys() & set(PENDING)


def test_every_listed_case_is_there():
    for name in RUNNERS:
        path = FOLDER / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            assert content["n_cases"] == len(content["cases"])
            assert len({case.get("name", i) for i, case in enumerate(content["cases"])}) == content["n_cases"]
