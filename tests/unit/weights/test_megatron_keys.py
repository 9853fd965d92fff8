"""Where parameters lie in a Megatron checkpoint; that Megatron agrees is in tests/dist/test_conversion.py."""

from math import prod
from typing import Any

import pytest

from megatron_troll.mcore.shape import shape_of
from megatron_troll.weights.families import table_of
from megatron_troll.weights.megatron_keys import Keys, Region, written_keys
from megatron_troll.weights.table import Table
from tests.dist.tiny import DENSE, MOE, NEXT


def regions_of(config: dict[str, Any], name: str) -> tuple[Region, ...]:
    """Those of the parameter that a Hugging Face tensor is in."""
    table = table_of(shape_of(config))
    (place,) = (place for place in table.places() if name in place.names and not place.entry.copy)
    return written_keys(table).regions(place)


def test_layers_and_experts_are_stacked_and_the_gate_is_above_the_up_projection() -> None:
    gate, up = regions_of(MOE, "model.layers.3.mlp.experts.5.up_proj.weight")
    key, whole, shape = "decoder.layers.mlp.experts.experts.linear_fc1.weight", (4, 8, 48, 48), (1, 1, 24, 48)
    assert gate == Region(key, whole, (3, 5, 0, 0), shape)
    assert up == Region(key, whole, (3, 5, 24, 0), shape)


def test_layers_of_several_types_have_keys_of_their_own() -> None:
    gate, _ = regions_of(NEXT, "model.layers.3.mlp.experts.5.up_proj.weight")
    assert gate.key == "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    assert (gate.start, gate.shape[:1]) == ((5, 0, 0), (1,))
    projections = regions_of(NEXT, "model.layers.0.linear_attn.in_proj_ba.weight")
    prefix = "decoder.layers.0.self_attention.in_proj.weight."
    assert [region.key.removeprefix(prefix) for region in projections] == [
        "query",
        "key",
        "value",
        "z",
        "b",
        "a",
    ]
    assert all(region.whole == region.shape for region in projections)


@pytest.mark.parametrize(
    ("config", "name", "key"),
    [
        (DENSE, "input_layernorm", "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
        (DENSE, "post_attention_layernorm", "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
        (MOE, "post_attention_layernorm", "decoder.layers.pre_mlp_layernorm.weight"),
        (NEXT, "input_layernorm", "decoder.layers.0.self_attention.in_proj.layer_norm_weight"),
    ],
)
def test_a_norm_is_where_transformer_engine_keeps_it(config: dict[str, Any], name: str, key: str) -> None:
    (region,) = regions_of(config, f"model.layers.0.{name}.weight")
    assert region.key == key


def test_norms_of_local_layers_are_found_too() -> None:
    table = table_of(shape_of(MOE))
    (place,) = (
        place for place in table.places() if place.names == ("model.layers.1.input_layernorm.weight",)
    )
    keys = [regions[0].key for regions in Keys(table, stacked=True, prefix="policy.").candidates(place)]
    assert keys == [
        "policy.decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "policy.decoder.layers.input_layernorm.weight",
    ]


@pytest.mark.parametrize("config", [DENSE, MOE, NEXT], ids=["dense", "moe", "hybrid"])
def test_the_regions_of_a_key_fill_it(config: dict[str, Any]) -> None:
    table: Table = table_of(shape_of(config))
    keys = written_keys(table)
    wholes: dict[str, tuple[int, ...]] = {}
    cells: dict[str, set[tuple[int, ...]]] = {}
    covered: dict[str, int] = {}
    for place in table.places():
        for region in keys.regions(place):
            assert wholes.setdefault(region.key, region.whole) == region.whole
            assert region.start not in cells.setdefault(region.key, set())
            cells[region.key].add(region.start)
            covered[region.key] = covered.get(region.key, 0) + prod(region.shape)
    assert covered == {key: prod(whole) for key, whole in wholes.items()}
