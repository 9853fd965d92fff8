"""The tables: names of both layer specs, and both directions of every entry."""

import json
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.config.load import PRESETS
from megatron_troll.mcore.shape import ModelShape, shape_of
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import TensorSource, check
from megatron_troll.weights.table import Entry, HFTensor, Place, Table, parameters_of, tensors_of
from tests.dist.parameters import unshard
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import FAMILIES, QWEN3_5_MOE, QWEN3_5_TEXT
from tests.unit.weights.recorded_names import MODELS, OUTSIDE

QWEN3_30B_A3B = PRESETS / "models" / "Qwen3-30B-A3B" / "config.json"
QWEN3_NEXT_80B_A3B = PRESETS / "models" / "Qwen3-Next-80B-A3B-Instruct" / "config.json"
SHARDS = 4


def table_at(config: dict) -> Table:
    return table_of(shape_of(config))


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Any sizes that SHARDS divides where it must; any vocabulary."""
    groups = SHARDS * draw(st.integers(1, 2))
    config = draw(st.sampled_from([DENSE, MOE, NEXT, *FAMILIES.values()]))
    config = config.get("text_config", config)
    key_heads = SHARDS * draw(st.integers(1, 2))
    sizes = {
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": draw(st.integers(1, 9)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "intermediate_size": SHARDS * draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "moe_intermediate_size": SHARDS * draw(st.integers(1, 3)),
        "shared_expert_intermediate_size": SHARDS * draw(st.integers(1, 3)),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(st.integers(1, 5)),
        "linear_value_head_dim": draw(st.integers(1, 5)),
        "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0},
        "head_dim": 2 * draw(st.integers(1, 3)),
    }
    return shape_of(config | sizes)


@given(shapes(), st.sampled_from([1, 2, SHARDS]), st.integers(0, 2**31))
def test_every_entry_goes_back_to_the_same_bits(shape: ModelShape, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for entry in table_of(shape).entries:
        tensors = tuple(torch.randn(tensor.shape, generator=generator) for tensor in entry.hf)
        shards = [entry.shard(tensors, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        back = unshard(entry, shards)
        assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))


def entry_of(table: Table, name: str) -> Entry:
    place = table.find(name)
    assert place is not None, name
    return place.entry


def test_query_key_and_value_rows_are_grouped_and_sharded_by_query_group() -> None:
    sizes = {"hidden_size": 1, "head_dim": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    entry = entry_of(table_of(shape_of(DENSE | sizes)), "decoder.layers.0.self_attention.linear_qkv.weight")
    rows = (range(1, 9), [10, 11, 20, 21], [100, 101, 200, 201])
    query, key, value = (torch.tensor(list(row))[:, None] for row in rows)
    first, second = [1, 2, 3, 4, 10, 11, 100, 101], [5, 6, 7, 8, 20, 21, 200, 201]
    assert entry.shard((query, key, value), 0, 1)[:, 0].tolist() == first + second
    assert entry.shard((query, key, value), 1, 2)[:, 0].tolist() == second


def test_gate_and_up_are_cut_apart() -> None:
    table = table_of(shape_of(MOE | {"hidden_size": 1, "moe_intermediate_size": 4}))
    entry = entry_of(table, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight")
    gate, up = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[10], [20], [30], [40]])
    assert [entry.shard((gate, up), rank, 2)[:, 0].tolist() for rank in (0, 1)] == [
        [1, 2, 10, 20],
        [3, 4, 30, 40],
    ]


def test_query_heads_and_their_gates_are_grouped_by_query_group() -> None:
    sizes = {"hidden_size": 1, "head_dim": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}
    entry = entry_of(table_of(shape_of(NEXT | sizes)), "decoder.layers.0.self_attention.linear_qkv.weight")
    heads = [[h, h + 1, -h, -h - 1] for h in (1, 3, 5, 7)]  # query rows, then gate rows
    query = torch.tensor(heads).reshape(-1, 1)
    key, value = (torch.tensor(rows)[:, None] for rows in ([10, 11, 20, 21], [100, 101, 200, 201]))
    first, second = (entry.shard((query, key, value), rank, 2)[:, 0].tolist() for rank in (0, 1))
    assert first == [1, 2, 3, 4, -1, -2, -3, -4, 10, 11, 100, 101]
    assert second == [5, 6, 7, 8, -5, -6, -7, -8, 20, 21, 200, 201]


def test_projections_of_linear_attention_are_sorted_by_kind_and_each_is_cut_by_heads() -> None:
    sizes = {"hidden_size": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"linear_key_head_dim": 1, "linear_value_head_dim": 1}
    entry = entry_of(table_of(shape_of(NEXT | sizes)), "decoder.layers.0.self_attention.in_proj.weight")
    # For each of two key heads: q, k, then v and z of its two value heads; b and a of them.
    qkvz = torch.tensor([1, 10, 100, 101, 1000, 1001, 2, 20, 200, 201, 2000, 2001])[:, None]
    ba = torch.tensor([-1, -2, -10, -20, -3, -4, -30, -40])[:, None]
    first, second = (entry.shard((qkvz, ba), rank, 2)[:, 0].tolist() for rank in (0, 1))
    assert first == [1, 10, 100, 101, 1000, 1001, -1, -2, -10, -20]
    assert second == [2, 20, 200, 201, 2000, 2001, -3, -4, -30, -40]


def test_projections_that_are_apart_already_are_cut_by_heads() -> None:
    sizes = {"hidden_size": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    sizes |= {"linear_key_head_dim": 1, "linear_value_head_dim": 1}
    table = table_of(shape_of(QWEN3_5_TEXT | sizes))
    entry = entry_of(table, "decoder.layers.0.self_attention.in_proj.weight")
    qkv, z = [1, 2, 10, 20, 100, 101, 200, 201], [1000, 1001, 2000, 2001]
    b, a = [-1, -2, -3, -4], [-10, -20, -30, -40]
    tensors = tuple(torch.tensor(rows)[:, None] for rows in (qkv, z, b, a))
    first, second = (entry.shard(tensors, rank, 2)[:, 0].tolist() for rank in (0, 1))
    assert first == [1, 10, 100, 101, 1000, 1001, -1, -2, -10, -20]
    assert second == [2, 20, 200, 201, 2000, 2001, -3, -4, -30, -40]


def test_beside_a_vision_tower_only_the_names_differ() -> None:
    alone = table_of(shape_of(QWEN3_5_MOE["text_config"]))
    beside = table_of(shape_of(QWEN3_5_MOE))
    assert list(beside.tensors()) == [
        name.replace("model.", "model.language_model.", 1) for name in alone.tensors()
    ]
    assert {each.name.format(l=0) for each in beside.stacked} == {
        f"model.language_model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down")
    }


def test_each_layer_of_a_hybrid_has_the_tensors_of_its_type() -> None:
    names = table_of(shape_of(NEXT)).tensors()
    for layer, kind in enumerate(NEXT["layer_types"]):
        mine = {name.split(".")[3] for name in names if name.startswith(f"model.layers.{layer}.")}
        attention = "linear_attn" if kind == "linear_attention" else "self_attn"
        assert mine == {attention, "mlp", "input_layernorm", "post_attention_layernorm"}


@pytest.mark.parametrize(
    ("config", "extra", "carried"),
    [
        (NEXT, "mtp.fc.weight", True),
        (NEXT, "mtpx.weight", False),
        (NEXT, "model.visual.x", False),
        (MOE, "mtp.fc.weight", False),
        (QWEN3_5_MOE, "mtp.fc.weight", True),
        (QWEN3_5_MOE, "model.visual.x", True),
        (QWEN3_5_MOE, "model.language_model.x", False),
        (QWEN3_5_TEXT, "mtp.fc.weight", True),
        (QWEN3_5_TEXT, "model.visual.x", False),
    ],
)
def test_only_multi_token_prediction_and_a_vision_tower_are_carried(
    config: dict[str, Any], extra: str, carried: bool
) -> None:
    table = table_of(shape_of(config))
    source = {name: torch.zeros(tensor.shape) for name, tensor in table.tensors().items()}
    unused = pytest.raises(ValueError, match=rf"unused: {extra} \(3,\)")
    with nullcontext() if carried else unused:
        check(TensorSource(source | {extra: torch.zeros(3)}), table, tied=False)


def test_the_vocabulary_is_padded_with_zero_rows_that_do_not_come_back() -> None:
    shape = shape_of(DENSE | {"hidden_size": 2, "vocab_size": 5})
    entry = entry_of(table_of(shape), "embedding.word_embeddings.weight")
    rows = torch.arange(1.0, 11.0).reshape(5, 2)
    shards = [entry.shard((rows,), rank, 4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [shape.padded_vocab(4) // 4] * 4
    assert torch.equal(torch.cat(shards), torch.cat([rows, torch.zeros(3, 2)]))
    assert torch.equal(unshard(entry, shards)[0], rows)


def test_an_axis_that_does_not_divide_is_an_error() -> None:
    entry = Entry((HFTensor("w", (5, 2)),), ("w",), axis=0)
    with pytest.raises(ValueError, match="w: 5 along axis 0 cannot be divided by 2 shards"):
        entry.shard((torch.zeros(5, 2),), 0, 2)


@pytest.mark.parametrize("name", MODELS)
def test_on_transformer_engine_every_tensor_is_that_of_one_parameter(name: str) -> None:
    config, layers = MODELS[name]
    table = table_of(shape_of(config))
    named = list(OUTSIDE)
    for layer, kind in enumerate(table.layer_types):
        for parameter in layers[kind]:
            experts = range(table.experts) if "{e}" in parameter else [0]
            named += [f"decoder.layers.{layer}.{parameter.format(e=expert)}" for expert in experts]
    places = [table.find(each) for each in named]
    assert [each for each, place in zip(named, places) if place is None] == []
    tensors = [tensor for place in places if place for tensor in place.names]
    assert sorted(tensors) == sorted(table.tensors())


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.bias", "x.output_layer.weight", "output_layer.weight.x"]
)
def test_unknown_parameters_have_no_place(name: str) -> None:
    assert table_of(shape_of(MOE)).find(name) is None


def test_a_tied_head_is_the_embedding() -> None:
    table = table_of(shape_of(MOE | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in table.tensors()
    assert entry_of(table, "output_layer.weight").copy


def test_published_sizes() -> None:
    assert parameters_of(table_at(json.loads(QWEN3_30B_A3B.read_text()))) == 30_532_122_624
    assert parameters_of(table_at(json.loads(QWEN3_NEXT_80B_A3B.read_text()))) == 79_674_391_296
    qwen3_0_6b = DENSE | {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    assert parameters_of(table_at(qwen3_0_6b)) == 596_049_920


def test_one_parameter_is_held_at_a_time() -> None:
    alive: list[int] = [0]
    entry = Entry((HFTensor("layers.{l}.w.weight", (4, 4)),), ("decoder.layers.{l}.w.weight",), axis=0)
    places = list(Table((entry,), ("full_attention",) * 3, experts=0).places())

    def made() -> Iterator[tuple[Place, tuple[Tensor, ...]]]:
        for place in places:
            assert alive == [0]
            whole = torch.ones(4, 4)
            alive[0] += 1
            weakref.finalize(whole.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
            parts = (whole,)
            del whole
            yield place, parts
            del parts

    names = [name for name, _ in map(_let_go, tensors_of(made()))]
    assert len(names) == 3


def _let_go(item: tuple[str, Tensor]) -> tuple[str, None]:
    return item[0], None


def test_one_shard_is_not_copied() -> None:
    whole = torch.arange(16.0).view(4, 4)
    entry = Entry((HFTensor("w", (4, 4)),), ("w",), axis=0)
    (part,) = entry.join([whole])
    assert part.data_ptr() == whole.data_ptr()
    assert torch.equal(entry.join([*whole.split(2)])[0], whole)
