"""Every case of every golden file that the product implements (golden/README.md).

The folder is the environment variable GOLDEN_DIR, or tests/golden. A file is run by the runner of its
name in tests/unit/golden/; a file without one is an error.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.unit.golden import (
    baseline_masks,
    cppo_masks,
    dfpo,
    grpo_fix,
    gspo,
    jackpot,
    k_estimators,
    misc,
    tike,
    troll_objective,
    troll_projection,
    troll_sparsify,
    troll_x_cppo,
)
from tests.unit.golden.runner import differences

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden"))
RUNNERS = {
    "baseline_masks": baseline_masks.RUNNER,
    "cppo_masks": cppo_masks.RUNNER,
    "dfpo": dfpo.RUNNER,
    "grpo_fix": grpo_fix.RUNNER,
    "gspo": gspo.RUNNER,
    "troll_x_cppo": troll_x_cppo.RUNNER,
    "troll_sparsify": troll_sparsify.RUNNER,
    "troll_projection": troll_projection.RUNNER,
    "troll_objective": troll_objective.RUNNER,
    "jackpot": jackpot.RUNNER,
    "k_estimators": k_estimators.RUNNER,
    "misc": misc.RUNNER,
    "tike": tike.RUNNER,
}


def _cases() -> list:
    found = []
    for name in RUNNERS:
        path = FOLDER / f"{name}.json"
        for index, case in enumerate(_cases_in(path) if path.exists() else []):
            found.append(pytest.param(name, case, id=f"{name}-{case.get('name', index)}"))
    return found


def _cases_in(path: Path) -> list:
    content = json.loads(path.read_text())
    return misc.cases(content) if path.stem == "misc" else content["cases"]


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


def test_every_file_has_a_runner():
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files, f"no golden file in {FOLDER}"
    assert files <= RUNNERS.keys()


def test_every_listed_case_is_there():
    for name in RUNNERS:
        path = FOLDER / f"{name}.json"
        if path.exists():
            content, cases = json.loads(path.read_text()), _cases_in(path)
            assert content.get("n_cases", len(cases)) == len(cases) > 0
            assert len({case.get("name", i) for i, case in enumerate(cases)}) == len(cases)
