"""Each check tells what is there, and what to do where it is not enough."""

from pathlib import Path

import pytest
import torch

from megatron_troll.config.load import load
from megatron_troll.launch.plan.build import GIB, plan
from megatron_troll.preflight import node, packages
from megatron_troll.preflight.finding import Finding
from megatron_troll.preflight.needs import gpu_bytes
from megatron_troll.preflight.run import Report, failures, grouped

EXAMPLES = Path(__file__).parents[3] / "examples" / "configs"
TIB = 2**40


def test_the_pinned_megatron_core_is_asked_for() -> None:
    found = {finding.check: finding for finding in packages.findings(cuda=False)}
    assert found["megatron-core"] == Finding("megatron-core", "ok", packages.pinned())
    assert found["torch"].text == torch.__version__


def test_another_megatron_core_is_refused() -> None:
    finding = packages.core("0.16.1", "0.19.2")
    assert (finding.level, finding.text) == ("failed", "0.16.1")
    assert finding.advice.startswith("install megatron-core==0.19.2")


def test_an_extension_that_does_not_import_is_a_failure() -> None:
    fine = packages.extension("transformer-engine", "json", {"transformer-engine": "2.20.2"}.__getitem__)
    assert (fine.level, fine.text) == ("ok", "2.20.2")
    broken = packages.extension("transformer-engine", "no_such", {"transformer-engine": "2.20.2"}.__getitem__)
    assert broken.level == "failed"
    assert broken.text == (
        "2.20.2, but `import no_such` fails: ModuleNotFoundError: No module named 'no_such'"
    )
    assert f"torch {torch.__version__}" in broken.advice
    assert packages.extension("no-such-package", "json").level == "warning"


def test_a_flash_linear_attention_that_is_too_old_is_a_failure() -> None:
    finding = packages.extension(packages.LINEAR_ATTENTION, "json", lambda name: "0.4.2")
    assert (finding.level, finding.text) == ("failed", "0.4.2")
    assert "pip install 'flash-linear-attention>=0.6'" in finding.advice


def test_pypis_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.apex().level == "warning"
    (tmp_path / "apex.py").touch()
    assert packages.apex().level == "failed"
    assert "is not NVIDIA's" in packages.apex().text
    (tmp_path / "amp_C.py").touch()
    assert packages.apex().level == "ok"


def test_a_disk_that_is_too_small_says_where_and_how_much(tmp_path: Path) -> None:
    assert node.disk(tmp_path / "not" / "yet", 1).level == "ok"
    finding = node.disk(tmp_path / "not" / "yet", 10**6 * TIB)
    assert finding.level == "failed"
    assert f"free at {tmp_path}, 1024000000.0 needed" in finding.text


def test_gpus_that_are_not_there() -> None:
    assert node.gpus(1000).level == "failed"
    assert node.gpus(1000).text.endswith("of 1000 asked for")
    assert node.gpus(0).level == "ok"


def test_the_gpu_with_the_least_room_is_held_against_the_plan() -> None:
    free = [130 * GIB, 80 * GIB, 130 * GIB]
    (enough,), (short,) = (list(node.gpu_memory(free, wanted * GIB)) for wanted in (80, 90))
    assert (enough.level, enough.text) == ("ok", "80.0 GiB free on GPU 1, 80.0 planned")
    assert (short.level, short.text) == ("failed", "80.0 GiB free on GPU 1, 90.0 planned")
    assert "mtroll plan" in short.advice
    assert list(node.gpu_memory([], 80 * GIB)) == []


def test_what_a_run_needs_is_planned_for_all_gpus_of_all_nodes() -> None:
    config = load(EXAMPLES / "qwen3_30b_a3b_troll.yaml", ["launch.reserve_gib=0"])
    one, two = (gpu_bytes(config, nodes * 8) for nodes in (1, 2))
    assert one == plan(config).worst.total
    assert two < one


def test_nodes_that_agree_share_a_row() -> None:
    alike, small, large = (
        Finding("torch", "ok", "2.13.0"),
        Finding("disk", "failed", "1 GiB", "free some"),
        Finding("disk", "ok", "9 GiB"),
    )
    reports = [
        Report("vn0", (alike, large)),
        Report("vn1", (alike, small)),
        Report("vn2", (alike, large)),
    ]
    assert grouped(reports) == [(alike, ["vn0", "vn1", "vn2"]), (large, ["vn0", "vn2"]), (small, ["vn1"])]
    assert failures(reports) == ["vn1: disk: 1 GiB; free some"]
