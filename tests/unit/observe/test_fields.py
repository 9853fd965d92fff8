"""docs/metrics.md says what the table says."""

from pathlib import Path

import pytest

from megatron_troll.config import ObjectiveConfig, Slot, known_methods
from megatron_troll.objectives.compose import compose
from megatron_troll.observe.fields import markdown
from megatron_troll.observe.metrics import REDUCTIONS, metric_name
from tests.documented import documented

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def test_docs_are_made_from_the_table() -> None:
    assert DOCS.read_text() == markdown(), "run: python -m megatron_troll.observe.fields > docs/metrics.md"


@pytest.mark.parametrize("name", ["step", "kl_before", "kl_before/p99", "seconds", "seconds/generation"])
def test_known_fields(name: str) -> None:
    assert documented(name)


@pytest.mark.parametrize("name", ["kl", "kl_before/p12", "loss/p99", "seconds/lunch", "generation"])
def test_unknown_fields(name: str) -> None:
    assert not documented(name)


@pytest.mark.parametrize("region", known_methods("megatron_troll.objectives.trust_region"))
def test_every_diagnostic_of_an_objective_is_documented_and_reducible(region: str) -> None:
    check(ObjectiveConfig(trust_region=Slot(name=region)))


@pytest.mark.parametrize("name", known_methods("megatron_troll.objectives.ratio"))
def test_so_is_every_diagnostic_of_a_ratio(name: str) -> None:
    check(ObjectiveConfig(trust_region=Slot(name="clip"), ratio=Slot(name=name)))


@pytest.mark.parametrize("name", known_methods("megatron_troll.objectives.kl"))
def test_so_is_every_diagnostic_of_a_kl(name: str) -> None:
    check(ObjectiveConfig(trust_region=Slot(name="none"), kl=Slot(name=name)))


@pytest.mark.parametrize("name", known_methods("megatron_troll.objectives.correction"))
def test_so_is_every_diagnostic_of_a_correction(name: str) -> None:
    check(ObjectiveConfig(trust_region=Slot(name="none"), correction=Slot(name=name)))


def check(config: ObjectiveConfig) -> None:
    table = compose(config).diagnostics
    written = [metric_name(name, reduction) for name, reductions in table.items() for reduction in reductions]
    assert [name for name in written if not documented(name)] == []
    assert {reduction for reductions in table.values() for reduction in reductions} <= set(REDUCTIONS)
