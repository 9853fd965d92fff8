"""The Qwen3 table: names of both layer specs, and both directions of every entry."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_troll.mcore.shape import ModelShape, shape_of
from megatron_troll.weights.families import count_parameters, table_of
from megatron_troll.weights.table import Entry, HFTensor, Table
from tests.dist.tiny import DENSE, MOE

QWEN3_30B_A3B = Path(__file__).with_name("qwen3_30b_a3b.json")
SHARDS = 4


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Any sizes that SHARDS divides where it must; any vocabulary."""
    groups = SHARDS * draw(st.integers(1, 2))
    moe = draw(st.booleans())
    sizes = {
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": draw(st.integers(1, 9)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 5)),
        "intermediate_size": SHARDS * draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if moe:
        sizes |= {"moe_intermediate_size": SHARDS * draw(st.integers(1, 3))}
    return shape_of((MOE if moe else DENSE) | sizes)


@given(shapes(), st.sampled_from([1, 2, SHARDS]), st.integers(0, 2**31))
def test_every_entry_goes_back_to_the_same_bits(shape: ModelShape, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for entry in table_of(shape).entries:
        tensors = tuple(torch.randn(tensor.shape, generator=generator) for tensor in entry.hf)
        shards = [entry.shard(tensors, rank, size) for rank in range(size)]
        assert len({shard.shape for shard in shards}) == 1
        back = entry.unshard(shards)
        assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))


def entry_of(table: Table, name: str) -> Entry:
    place = table.find(name)
    assert place is not None, name
    return place.entry


def test_query_key_and_value_rows_are_grouped_and_sharded_by_query_group() -> None:
    sizes = {"hidden_size": 1, "head_dim": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    entry = entry_of(table_of(shape_of(DENSE | sizes)), "decoder.layers.0.self_attention.linear_qkv.weight")
    query, key, value = (torch.tensor(rows)[:, None] for rows in ([1, 2, 3, 4], [10, 20], [100, 200]))
    assert entry.shard((query, key, value), 0, 1)[:, 0].tolist() == [1, 2, 10, 100, 3, 4, 20, 200]
    assert entry.shard((query, key, value), 1, 2)[:, 0].tolist() == [3, 4, 20, 200]


def test_gate_and_up_are_cut_apart() -> None:
    table = table_of(shape_of(MOE | {"hidden_size": 1, "moe_intermediate_size": 4}))
    entry = entry_of(table, "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight")
    gate, up = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[10], [20], [30], [40]])
    assert [entry.shard((gate, up), rank, 2)[:, 0].tolist() for rank in (0, 1)] == [
        [1, 2, 10, 20],
        [3, 4, 30, 40],
    ]


def test_the_vocabulary_is_padded_with_zero_rows_that_do_not_come_back() -> None:
    shape = shape_of(DENSE | {"hidden_size": 2, "vocab_size": 5})
    entry = entry_of(table_of(shape), "embedding.word_embeddings.weight")
    rows = torch.arange(1.0, 11.0).reshape(5, 2)
    shards = [entry.shard((rows,), rank, 4) for rank in range(4)]
    assert [len(shard) for shard in shards] == [shape.padded_vocab(4) // 4] * 4
    assert torch.equal(torch.cat(shards), torch.cat([rows, torch.zeros(3, 2)]))
    assert torch.equal(entry.unshard(shards)[0], rows)


def test_an_axis_that_does_not_divide_is_an_error() -> None:
    entry = Entry((HFTensor("w", (5, 2)),), ("w",), axis=0)
    with pytest.raises(ValueError, match="w: 5 along axis 0 cannot be divided by 2 shards"):
        entry.shard((torch.zeros(5, 2),), 0, 2)


# The same parameter in the local spec and in Transformer Engine's.
NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "mlp.experts.local_experts.7.linear_fc1.weight": "mlp.experts.linear_fc1.weight7",
    "mlp.experts.local_experts.7.linear_fc2.weight": "mlp.experts.linear_fc2.weight7",
}


@pytest.mark.parametrize("local", NAMES)
def test_both_layer_specs_lead_to_the_same_tensors(local: str) -> None:
    table = table_of(shape_of(MOE))
    found = [table.find(f"decoder.layers.31.{name}") for name in (local, NAMES[local])]
    assert found[0] is not None
    assert found[0] == found[1]
    assert (found[0].layer, found[0].expert) == (31, 7 if "experts" in local else None)


def test_the_dense_norm_before_the_mlp_has_its_transformer_engine_name() -> None:
    place = table_of(shape_of(DENSE)).find("decoder.layers.2.mlp.linear_fc1.layer_norm_weight")
    assert place is not None
    assert place.names == ("model.layers.2.post_attention_layernorm.weight",)


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
    assert count_parameters(shape_of(json.loads(QWEN3_30B_A3B.read_text()))) == 30_532_122_624
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
    assert count_parameters(shape_of(qwen3_0_6b)) == 596_049_920
