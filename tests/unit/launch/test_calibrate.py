"""The tool's file is one that `serve` takes, with the magnitudes of what the model caches."""

from pathlib import Path

import calibrate_fp8_kv as tool
import pytest
import torch

from megatron_troll.launch.kv_scales import check_scales
from megatron_troll.mcore.shape import shape_of
from tests.dist.tiny import DENSE, reference

SEQUENCES = ([5, 6, 7, 8], [100, 3, 50])


def test_values_are_those_that_the_projection_gives() -> None:
    """Values are cached as they come from their projection; the keys are made small here."""
    model = reference(DENSE)
    seen: list[list[torch.Tensor]] = []
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.data.mul_(1e-6)
        outputs: list[torch.Tensor] = []
        layer.self_attn.v_proj.register_forward_hook(lambda *call, to=outputs: to.append(call[2]))
        seen.append(outputs)
    found = tool.largest(model, SEQUENCES)
    heads, width = DENSE["num_key_value_heads"], DENSE["head_dim"]
    for i, outputs in enumerate(seen):
        values = torch.cat([output.reshape(-1, heads, width) for output in outputs])
        torch.testing.assert_close(found[i], values.abs().amax((0, 2)))


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_the_file_is_one_for_so_many_ranks(tp: int, tmp_path: Path) -> None:
    found = tool.largest(reference(DENSE), SEQUENCES)
    written = tool.scales(found, "qwen3", DENSE["hidden_size"], tp)
    file = tmp_path / "scales.json"
    file.write_text(written.model_dump_json())
    check_scales(file, shape_of(DENSE), tp)
    factors = written.kv_cache.scaling_factor
    for layer, row in enumerate(found):
        assert max(ranks[layer] for ranks in factors.values()) == pytest.approx(float(row.max()) / 448)
    assert len({tuple(ranks.values()) for ranks in factors.values()}) == min(tp, len(found[0]))


def test_ranks_that_heads_cannot_be_spread_over() -> None:
    with pytest.raises(SystemExit, match="4 heads"):
        tool.scales(torch.ones(2, 4), "qwen3", 64, 3)
