"""Weights on real Megatron models: logits as Hugging Face's, and bit-equal round trips, on every layout."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_troll.config import Layout, Model
from megatron_troll.config.load import PRESETS
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.packing import zigzag
from megatron_troll.mcore.schedule import infer
from megatron_troll.mcore.shape import read_shape, shape_of
from megatron_troll.parallel.groups import Groups
from megatron_troll.types import MicroBatch
from megatron_troll.weights.export import save, stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.placement import held_parameters, shard_group
from megatron_troll.weights.source import FolderSource, RandomSource
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS, Sizes, expected_groups, formed_groups
from tests.dist.parameters import parameters_by_name
from tests.dist.tiny import DENSE, MOE, NEXT, started, unpacked, write_reference
from tests.dist.tiny_families import QWEN3_5_MOE

QWEN3_30B_A3B = PRESETS / "models" / "Qwen3-30B-A3B" / "config.json"

DENSE_LAYOUTS = {"one-rank": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2})}


Logits = list[tuple[int, Tensor, Tensor]]


@dataclass(frozen=True)
class Reference:
    """A folder in Hugging Face format and its model's logits [4, 16, V]."""

    folder: Path
    logits: Tensor


@dataclass(frozen=True)
class RankResult:
    """One rank's groups, the tensors whose round trip is not bit-equal, and its logits: (row,
    positions, [positions, V])."""

    groups: Sizes
    differing: list[str]
    logits: Logits


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    """[4, 16]."""
    return torch.randint(0, MOE["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> dict[str, Reference]:
    written = {}
    configs = {"moe": MOE, "dense": DENSE, "tied": MOE | {"tie_word_embeddings": True}, "next": NEXT}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(name)
        with torch.no_grad():
            written[name] = Reference(folder, write_reference(config, folder)(tokens).logits)
    return written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moe_equals_hugging_face(
    layout: str, references: dict[str, Reference], tokens: Tensor, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    check_results(run_on(world, request, sizes, references["moe"], tokens), references["moe"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_next_equals_hugging_face(
    layout: str, references: dict[str, Reference], tokens: Tensor, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    check_results(run_on(world, request, sizes, references["next"], tokens), references["next"], 1e-4)


@pytest.mark.parametrize("kind", ["dense", "tied"])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_dense_and_tied_models_equal_hugging_face(
    kind: str, layout: str, references: dict[str, Reference], tokens: Tensor, request: pytest.FixtureRequest
) -> None:
    world, sizes = DENSE_LAYOUTS[layout]
    if kind == "tied" and "tp" in sizes:
        sizes = sizes | {"etp": sizes["tp"]}
    check_results(run_on(world, request, sizes, references[kind], tokens), references[kind])


def run_on(
    world: int, request: pytest.FixtureRequest, sizes: Sizes, reference: Reference, tokens: Tensor
) -> list[RankResult]:
    """The results of the ranks, on which the layout was formed."""
    pool = request.getfixturevalue(f"ranks{world}")
    results = pool.run(load_and_read, sizes, str(reference.folder), tokens)
    assert [result.groups for result in results] == [expected_groups(world, sizes)] * world
    return results


def check_results(results: list[RankResult], reference: Reference, tolerance: float = 1e-5) -> None:
    """Every tensor came back bit-equal, and every logit is Hugging Face's."""
    seen = torch.zeros(reference.logits.shape[:2], dtype=torch.bool)
    for result in results:
        assert result.differing == []
        for row, positions, values in result.logits:
            seen[row, positions] = True
            torch.testing.assert_close(values, reference.logits[row, positions], rtol=0, atol=tolerance)
    assert seen.all()


def load_and_read(sizes: Sizes, folder: str, tokens: Tensor) -> RankResult:
    layout = Layout(**sizes)
    with started(layout) as groups:
        model = build(Model(path=folder, dtype="fp32", layout=layout), read_shape(folder), groups)
        fill_with_nan(model)
        source = FolderSource(folder)
        load(model, source)
        logits = read_logits(model, tokens)
        exported = dict(stream(model))
        differing = [name for name in source.shapes if not torch.equal(exported[name], source.read(name))]
        differing += [name for name in exported if name not in source.shapes]
        return RankResult(formed_groups(groups), differing, logits)


def fill_with_nan(model: MegatronModel) -> None:
    """So that a parameter nobody loads shows."""
    with torch.no_grad():
        for parameter in parameters_by_name(model).values():
            parameter.fill_(torch.nan)


def read_logits(model: MegatronModel, tokens: Tensor) -> Logits:
    """What this rank computes of the logits; nothing unless it is on the last stage."""
    groups, head = model.groups, Head(model)
    batches = [one_row(tokens, row, groups) for row in rows_of(tokens, groups)]

    def read(index: int, hidden: Tensor) -> tuple[int, Tensor, Tensor]:
        shards = groups.tp.all_gather(head.logits(hidden))
        values = torch.cat(shards, -1)[:, : model.shape.vocab]
        return batches[index].rollouts[0], batches[index].positions[0], values

    model.train(False)
    return infer(model, batches, read)


def rows_of(tokens: Tensor, groups: Groups) -> range:
    """Each data-parallel rank reads other rows."""
    return range(groups.dp.rank, len(tokens), groups.dp.size)


def one_row(tokens: Tensor, row: int, groups: Groups) -> MicroBatch:
    """Row `row` unpacked, every position read, this context-parallel rank's slice of it."""
    positions = zigzag(tokens.shape[1], groups.cp.size, groups.cp.rank)
    mine = tokens[row, positions]
    batch = unpacked(mine[None], positions, tokens.shape[1], torch.arange(len(mine)), mine)
    return replace(batch, rollouts=(row,))


def test_the_exported_folder_opens_in_transformers(
    ranks2: RankPool, references: dict[str, Reference], tokens: Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, expected = references["moe"].folder, references["moe"].logits
    target = tmp_path / "exports" / "final"
    ranks2.run(load_and_save, str(folder), str(target))
    ranks2.run(load_and_save, str(folder), str(target))
    assert [path.name for path in target.parent.iterdir()] == ["final"]
    assert len(list(target.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)


def load_and_save(folder: str, target: str) -> list[str]:
    layout = Layout(tp=2, ep=2)
    with started(layout) as groups:
        model = build(Model(path=folder, dtype="fp32", layout=layout), read_shape(folder), groups)
        load(model, FolderSource(folder))
        return save(model, target, folder, max_shard_bytes=100_000)


def test_an_export_has_the_form_and_the_untrained_tensors_of_its_start(
    ranks2: RankPool, tmp_path: Path
) -> None:
    """Experts stacked in one layer and apart in another, under expert parallelism: ranks take turns."""
    source = tmp_path / "hf"
    write_reference(QWEN3_5_MOE, source)
    begun = FolderSource(source)
    tensors = {name: begun.read(name) for name in begun.shapes} | {"mtp.fc.weight": torch.randn(48, 96)}
    prefix = "model.language_model.layers.1.mlp.experts."
    names = [[f"{prefix}{expert}.{kind}_proj.weight" for kind in ("gate", "up")] for expert in range(8)]
    tensors[f"{prefix}gate_up_proj"] = torch.stack(
        [torch.cat([tensors.pop(name) for name in of_expert]) for of_expert in names]
    )
    save_file(tensors, source / "model.safetensors")
    messages = ranks2.run(load_and_save, str(source), str(tmp_path / "export"))
    exported = FolderSource(tmp_path / "export")
    assert exported.shapes.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(exported.read(name), tensors[name])] == []
    assert (tmp_path / "export" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    told = [
        f"mtp.* (prediction heads): not trained, as in {source} (tensors: 1)",
        f"model.visual.* (vision tower): not trained, as in {source} (tensors: 21)",
    ]
    assert messages == [told, told]
    (source / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=f"{source} has no weights: an export takes the vision tower"):
        ranks2.run(export_random, str(source), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def export_random(folder: str, target: str) -> None:
    layout = Layout(tp=2, ep=2)
    with started(layout) as groups:
        model = build(Model(path=folder, dtype="fp32", layout=layout), read_shape(folder), groups)
        load(model, RandomSource(model.shape, seed=1))
        save(model, target, folder)


def test_a_refused_target_raises_on_every_rank(ranks2: RankPool, references: dict[str, Reference]) -> None:
    messages = ranks2.run(refused, str(references["moe"].folder))
    assert all("is the folder the model came from" in message for message in messages)


def refused(folder: str) -> str:
    layout = Layout(pp=2)
    with started(layout) as groups:
        model = build(Model(path=folder, dtype="fp32", layout=layout), read_shape(folder), groups)
        with pytest.raises(ValueError, match="export to another") as caught:
            save(model, folder, folder)
        return str(caught.value)


def test_random_weights_are_the_same_on_every_layout_and_in_bf16(ranks1: RankPool, ranks4: RankPool) -> None:
    alone = ranks1.run(random_export, {})[0]
    for exported in ranks4.run(random_export, {"tp": 2, "pp": 2, "ep": 2}):
        assert exported.keys() == alone.keys()
        assert all(torch.equal(exported[name], alone[name]) for name in alone)
    gate = alone["model.layers.3.mlp.experts.7.gate_proj.weight"]
    assert gate.dtype == torch.bfloat16
    assert gate.float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(gate, alone["model.layers.3.mlp.experts.6.gate_proj.weight"])


def random_export(sizes: Sizes) -> dict[str, Tensor]:
    layout, shape = Layout(**sizes), shape_of(MOE)
    with started(layout) as groups:
        model = build(Model(path="none", dtype="bf16", layout=layout), shape, groups)
        load(model, RandomSource(shape, seed=3))
        return {name: tensor.clone() for name, tensor in stream(model)}


def test_qwen3_30b_a3b_has_the_parameters_of_hugging_face(ranks4: RankPool) -> None:
    config = json.loads(QWEN3_30B_A3B.read_text())
    shards: dict[tuple[str, int], int] = {}
    for held in ranks4.run(meta_shards, config):
        shards |= held
    assert sum(shards.values()) == hugging_face_parameters(config) == 30_532_122_624


def hugging_face_parameters(config: dict[str, Any]) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return sum(parameter.numel() for parameter in model.parameters())


def meta_shards(config: dict[str, Any]) -> dict[tuple[str, int], int]:
    """(first Hugging Face name, shard) -> elements, of a real Megatron model without storage."""
    layout, meta = Layout(tp=2, pp=2, ep=2), torch.device("meta")
    with started(layout) as groups, meta, patch("megatron_troll.mcore.model.device", lambda: meta):
        model = build(Model(path="none", layout=layout), shape_of(config), groups, trained=False)
        shards = {}
        for held in held_parameters(model, table_of(model.shape)):
            entry = held.place.entry
            shard = 0 if entry.axis is None else shard_group(groups, entry).rank
            shards[held.place.names[0], shard] = held.parameter.numel()
        return shards
