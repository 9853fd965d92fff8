"""Converted checkpoints and real Megatron: the same keys, and every layout reads what any other wrote."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_troll.config import Layout, Model, Optimizer
from megatron_troll.convert.plan import Options
from megatron_troll.convert.progress import NoProgress
from megatron_troll.convert.run import convert
from megatron_troll.convert.to_hugging_face import ToHuggingFace
from megatron_troll.convert.to_megatron import ToMegatron
from megatron_troll.mcore import checkpoint_tensors
from megatron_troll.mcore.checkpoint import CheckpointError, Checkpoints
from megatron_troll.mcore.checkpoint_sums import SumsError, sums_of, write_sums
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.parallel import inside
from megatron_troll.mcore.shape import read_shape, shape_of
from megatron_troll.parallel.groups import ALONE
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.megatron_keys import written_keys
from megatron_troll.weights.source import FolderSource, open_source
from tests.dist import tiny_families
from tests.dist.harness import RankPool
from tests.dist.layout_table import Sizes
from tests.dist.test_weights import Logits, fill_with_nan, read_logits
from tests.dist.tiny import DENSE, MOE, NEXT, started, write_reference

FAMILIES: dict[str, dict[str, Any]] = {"dense": DENSE, "moe": MOE, "hybrid": NEXT}
LAYOUTS: dict[str, tuple[int, Sizes]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2, "etp": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2-pp2-ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "tp2-ep2-etp2": (4, {"tp": 2, "ep": 2, "etp": 2}),
}
DENSE_LAYOUTS: dict[str, tuple[int, Sizes]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
LAYOUTS_OF = {"dense": DENSE_LAYOUTS, "moe": LAYOUTS, "hybrid": LAYOUTS}
PAIRS = [(family, layout) for family, layouts in LAYOUTS_OF.items() for layout in layouts]
TOLERANCE = {"dense": 1e-5, "moe": 1e-5, "hybrid": 1e-4}


@dataclass(frozen=True)
class Family:
    """A model in both formats, Hugging Face's logits [4, 16, V] of `tokens`, and a checkpoint of a run on
    every layout."""

    hugging_face: Path
    converted: Path
    tokens: Tensor
    logits: Tensor
    runs: Path

    def step(self, layout: str) -> Path:
        return self.runs / layout / "step_000001"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    made = {}
    for name, config in FAMILIES.items():
        place = tmp_path_factory.mktemp(name)
        tokens = torch.randint(0, config["vocab_size"], (4, 16), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            logits = write_reference(config, place / "hf")(tokens).logits
        converted(place / "hf", place / "mcore")
        made[name] = Family(place / "hf", place / "mcore", tokens, logits, place / "runs")
    return made


def converted(source: Path, target: Path) -> None:
    assert convert(ToMegatron(source, Options(shard_bytes=200_000)), target, ALONE, NoProgress())


@pytest.mark.parametrize(
    "config", [*FAMILIES.values(), MOE | {"tie_word_embeddings": True}, *tiny_families.FAMILIES.values()]
)
def test_the_keys_are_those_of_megatron(config: dict[str, Any], ranks1: RankPool) -> None:
    table = table_of(shape_of(config))
    keys = written_keys(table)
    places = [place for place in table.places() if not place.entry.copy]
    ours = {(r.key, r.whole, r.start, r.shape) for place in places for r in keys.regions(place)}
    assert ranks1.run(keys_of_megatron, config) == [ours]


def keys_of_megatron(config: dict[str, Any]) -> set[tuple[Any, ...]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    with started(Layout()) as groups:
        model = build(Model(path="none", dtype="fp32"), shape_of(config), groups)
        state = checkpoint_tensors.weights("", model)
        apply_factories(state)
        return {
            (
                tensor.key.removeprefix("."),
                tuple(tensor.global_shape),
                tuple(tensor.global_offset),
                (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
            )
            for tensor in nested_values(state)
        }


@dataclass(frozen=True)
class Reading:
    """What one rank read of a converted folder: the tensors that are not bit-equal to Hugging Face's when the
    trainer and when Megatron itself reads, and its share of the logits."""

    by_trainer: list[str]
    by_megatron: list[str]
    logits: Logits


@pytest.fixture(scope="module")
def readings(
    families: dict[str, Family], request: pytest.FixtureRequest
) -> dict[tuple[str, str], list[Reading]]:
    """Of every rank of every layout; each left a checkpoint of a run."""
    return {
        (name, layout): on_layout(request, name, layout, read_and_save, families[name], layout)
        for name, layout in PAIRS
    }


def on_layout(request: pytest.FixtureRequest, family: str, layout: str, function: Any, *args: Any) -> list:
    world, sizes = LAYOUTS_OF[family][layout]
    pool: RankPool = request.getfixturevalue(f"ranks{world}")
    return pool.run(function, sizes, *args)


def read_and_save(sizes: Sizes, family: Family, name: str) -> Reading:
    with built(sizes, family) as model:
        load(model, open_source(family.converted, model.shape))
        by_trainer, logits = differing(model, family), read_logits(model, family.tokens)
        fill_with_nan(model)
        read_by_megatron(model, family.converted)
        by_megatron = differing(model, family)
        trained = trainable(model, Optimizer(), total_steps=1)
        Checkpoints(family.runs / name, {"policy": trained}).save(1, {"step": 1})
        return Reading(by_trainer, by_megatron, logits)


@contextmanager
def built(sizes: Sizes, family: Family) -> Iterator[MegatronModel]:
    layout = Layout(**sizes)
    with started(layout) as groups:
        config = Model(path="none", dtype="fp32", layout=layout)
        model = build(config, read_shape(family.hugging_face), groups)
        fill_with_nan(model)
        yield model


def read_by_megatron(model: MegatronModel, folder: Path, prefix: str = "") -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding

    state = checkpoint_tensors.weights("", model)
    replace_prefix_for_sharding(state, ".", prefix)
    with inside(model.groups):
        loaded: Any = dist_checkpointing.load(state, str(folder / "tensors"))
    for i, stage in enumerate(model.stages):
        stage.load_state_dict(loaded[f"model{i}"], strict=False)


def differing(model: MegatronModel, family: Family) -> list[str]:
    source = FolderSource(family.hugging_face)
    return [name for name, tensor in stream(model) if not torch.equal(tensor, source.read(name))]


@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_every_layout_reads_a_converted_folder(
    family: str, layout: str, families: dict[str, Family], readings: dict[tuple[str, str], list[Reading]]
) -> None:
    expected = families[family].logits
    seen = torch.zeros(expected.shape[:2], dtype=torch.bool)
    for reading in readings[family, layout]:
        assert reading.by_trainer == []
        assert reading.by_megatron == []
        for row, positions, values in reading.logits:
            seen[row, positions] = True
            torch.testing.assert_close(values, expected[row, positions], rtol=0, atol=TOLERANCE[family])
    assert seen.all()


@pytest.mark.usefixtures("readings")
@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_a_checkpoint_of_every_layout_comes_back_bit_equal(
    family: str, layout: str, families: dict[str, Family], tmp_path: Path
) -> None:
    made = families[family]
    conversion = ToHuggingFace(made.step(layout), made.hugging_face, Options(shard_bytes=200_000))
    assert convert(conversion, tmp_path / "back", ALONE, NoProgress())
    back, source = FolderSource(tmp_path / "back"), FolderSource(made.hugging_face)
    assert back.shapes.keys() == source.shapes.keys()
    assert [name for name in source.shapes if not torch.equal(back.read(name), source.read(name))] == []


@pytest.mark.usefixtures("readings")
@pytest.mark.parametrize(("family", "layout"), PAIRS)
def test_every_layout_reads_what_any_other_saved(
    family: str, layout: str, families: dict[str, Family], request: pytest.FixtureRequest
) -> None:
    others = list(LAYOUTS_OF[family])
    assert on_layout(request, family, layout, read_runs, families[family], others)[0] == {
        other: [] for other in others
    }


def read_runs(sizes: Sizes, family: Family, layouts: list[str]) -> dict[str, list[str]]:
    with built(sizes, family) as model:
        found = {}
        for layout in layouts:
            fill_with_nan(model)
            read_by_megatron(model, family.step(layout), "policy.")
            found[layout] = differing(model, family)
        return found


def test_another_model_than_the_run_trained_is_refused(
    families: dict[str, Family], readings: object, tmp_path: Path
) -> None:
    config = json.loads((families["moe"].hugging_face / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(
        ValueError, match=r"holds another model than config.json describes: norm_eps 1e-06 there, 0.5 here"
    ):
        ToHuggingFace(families["moe"].step("one"), tmp_path, Options())


def test_a_checkpoint_of_a_newer_megatron_is_refused(
    families: dict[str, Family], readings: object, tmp_path: Path
) -> None:
    step = tmp_path / "step_000001"
    shutil.copytree(families["moe"].step("one"), step)
    manifest = json.loads((step / "checkpoint.json").read_text())
    manifest["versions"]["megatron-core"] = "99.0.0"
    (step / "checkpoint.json").write_text(json.dumps(manifest))
    write_sums(step, sums_of(step, ["checkpoint.json", *manifest["files"]]))
    with pytest.raises(
        CheckpointError, match=r"was written with megatron-core 99\.0\.0, and .* is installed"
    ):
        ToHuggingFace(step, families["moe"].hugging_face, Options())


def test_a_damaged_checkpoint_of_a_run_is_refused(
    families: dict[str, Family], readings: object, tmp_path: Path
) -> None:
    step = tmp_path / "step_000001"
    shutil.copytree(families["moe"].step("one"), step)
    damaged = max((step / "tensors").glob("*.distcp"))
    whole = damaged.read_bytes()
    flipped = bytearray(whole)
    flipped[-len(whole) // 3] ^= 1
    damaged.write_bytes(flipped)
    conversion = ToHuggingFace(step, families["moe"].hugging_face, Options())
    with pytest.raises(SumsError, match=f"^{re.escape(str(damaged))}: not as .* says: damaged"):
        convert(conversion, tmp_path / "out", ALONE, NoProgress())
    assert not (tmp_path / "out").exists()
    os.truncate(damaged, len(whole) - 1)
    with pytest.raises((CheckpointError, ValueError), match=re.escape(str(damaged))):
        ToHuggingFace(step, families["moe"].hugging_face, Options())
