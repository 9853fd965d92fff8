"""Every family on real Megatron models gives Hugging Face's logits, gradients and greedy answers, and its
tensors back, bit for bit, under data, tensor (with sequence), pipeline and context parallelism. Gradients are
those of samples that share prompts and turns, which Hugging Face's model reads one by one."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_troll.mcore.shape import shape_of
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, Unstacked
from tests.dist.families_worker import GENERATED, Result, loss_at, run_families, sequences_of
from tests.dist.harness import RankPool
from tests.dist.layout_table import Sizes, expected_groups
from tests.dist.layouts_batch import Weights
from tests.dist.layouts_checks import global_norm, worst_gradient
from tests.dist.parameters import constants_of
from tests.dist.tiny import write_reference
from tests.dist.tiny_families import FAMILIES

LAYOUTS: dict[str, Sizes] = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "cp2": {"cp": 2}}
PAIRS = [(family, layout) for family in FAMILIES for layout in LAYOUTS]
LINEAR_ATTENTION = 1e-4


@dataclass(frozen=True)
class Reference:
    """A folder in Hugging Face format; its model's logits [4, 24, V] in fp32, gradients in fp64 and the
    likeliest tokens [4, GENERATED] after each sequence."""

    folder: Path
    logits: Tensor
    gradients: Weights
    generated: Tensor


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """[4, 24]."""
    return torch.randint(0, 131, (4, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> dict[str, Reference]:
    return {name: made(config, tmp_path_factory.mktemp(name), tokens) for name, config in FAMILIES.items()}


def made(config: dict, folder: Path, tokens: Tensor) -> Reference:
    model = write_reference(config, folder)
    with torch.no_grad():
        logits = model(tokens).logits
        generated = torch.stack([greedy(model, sequence) for sequence in sequences_of(tokens)])
    if shape_of(config).experts:
        model.set_experts_implementation("eager")  # the grouped one has no float64
    model.double()
    loss_at(model, tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    apart = Unstacked(TensorSource(gradients), table_of(shape_of(config)))  # each expert by itself
    return Reference(folder, logits, {name: apart.read(name) for name in apart.shapes}, generated)


def greedy(model: torch.nn.Module, sequence: Tensor) -> Tensor:
    ids = sequence
    for _ in range(GENERATED):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids[len(sequence) :]


@pytest.fixture(scope="module")
def results(
    ranks2: RankPool, references: dict[str, Reference], tokens: Tensor
) -> dict[str, list[dict[str, Result]]]:
    folders = {name: str(reference.folder) for name, reference in references.items()}
    return {layout: ranks2.run(run_families, sizes, folders, tokens) for layout, sizes in LAYOUTS.items()}


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_a_family_equals_hugging_face(
    family: str, layout: str, references: dict[str, Reference], results: dict[str, list[dict[str, Result]]]
) -> None:
    reference, seen = references[family], torch.zeros(4, 24, dtype=torch.bool)
    tolerance = LINEAR_ATTENTION if shape_of(FAMILIES[family]).linear else 1e-5
    for result in (rank[family] for rank in results[layout]):
        assert result.groups == expected_groups(2, LAYOUTS[layout])
        assert result.differing == []
        for row, positions, values in result.logits:
            seen[row, positions] = True
            torch.testing.assert_close(values, reference.logits[row, positions], rtol=0, atol=tolerance)
        worst, name = worst_gradient(result.gradients, reference.gradients)
        assert worst < tolerance, name
        assert result.grad_norm == pytest.approx(global_norm(reference.gradients), rel=1e-5)
        assert layout == "cp2" or torch.equal(result.generated, reference.generated)
        assert result.kept == constants_of(shape_of(FAMILIES[family]))
    assert seen.all()
