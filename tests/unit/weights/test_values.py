"""Values that cannot be weights are found when they are read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.values import cast, check_values, codes_in

FILE = Path("model.safetensors")
TRAINED = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_that_is_not_finite_is_named_with_its_file_and_count(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensor = TRAINED.to(dtype, copy=True)
    tensor[3, 5] = tensor[60, 0] = value
    save_file({"good.weight": TRAINED, "bad.weight": tensor}, tmp_path / FILE)
    source = FolderSource(tmp_path)
    assert torch.equal(source.read("good.weight"), TRAINED)
    with pytest.raises(ConfigError, match=r"2 of the 3072 values of bad\.weight are not finite") as caught:
        source.read("bad.weight")
    assert str(caught.value).startswith(str(tmp_path / FILE))
    assert source.read("bad.weight", 0).shape == (48,)
    with pytest.raises(ConfigError, match=r"1 of the 48 values of bad\.weight"):
        source.read("bad.weight", 3)


def scaled_codes(dtype: torch.dtype, top: float) -> Tensor:
    """The codes of TRAINED in a format with values up to `top`, a scale a row, as bf16."""
    return (TRAINED / TRAINED.abs().amax(1, keepdim=True) * top).to(dtype).to(torch.bfloat16)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp4_codes() -> Tensor:
    scaled = TRAINED / TRAINED.abs().amax(1, keepdim=True) * 6
    nearest = FP4[(scaled.abs()[..., None] - FP4).abs().argmin(-1)]
    return (nearest * scaled.sign()).bfloat16()


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        (scaled_codes(torch.float8_e4m3fn, 448), "FP8"),
        (scaled_codes(torch.float8_e5m2, 57344), "FP8 (E5M2)"),
        (scaled_codes(torch.int8, 127), "integer"),
        (scaled_codes(torch.int8, 7), "integer"),
        (fp4_codes(), "FP4"),
    ],
    ids=["e4m3", "e5m2", "int8", "int4", "fp4"],
)
def test_codes_saved_again_without_scales_are_recognised(codes: Tensor, kind: str, tmp_path: Path) -> None:
    """transformers copies the codes of some tools into bf16 weights, and drops the scales."""
    save_file({"x.weight": codes}, tmp_path / FILE)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert codes_in(codes, float(codes.abs().max())) == kind
    with pytest.raises(ConfigError) as caught:
        FolderSource(tmp_path).read("x.weight")
    assert f"x.weight holds {kind} codes (from -" in str(caught.value)
    assert "as bfloat16 without scales" in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        TRAINED,
        TRAINED.bfloat16() * 1000,
        TRAINED.to(torch.float8_e4m3fn).float(),  # rounded to FP8 with a scale of 1: numbers
        torch.full((64, 48), 8.0),
        torch.zeros(64, 48),
        torch.arange(512.0),
        torch.tensor(300.0),
        torch.zeros(0, 4),
        torch.arange(300).reshape(3, 100),
    ],
    ids=["fp32", "large", "rounded", "constant", "zeros", "vector", "scalar", "empty", "integers"],
)
def test_weights_are_taken_for_weights(tensor: Tensor) -> None:
    check_values(tensor, "x", FILE)


def test_values_out_of_the_range_of_a_narrower_dtype_are_counted() -> None:
    tensor = TRAINED.clone()
    tensor[0, :3] = torch.tensor([1e6, -1e6, 65504.0])
    with pytest.raises(ConfigError, match=r"x: 2 of 3072 values do not fit into float16.*65504.*1e\+06"):
        cast(tensor, torch.float16, "x")
    assert torch.equal(cast(tensor, torch.bfloat16, "x"), tensor.bfloat16())
    assert cast(torch.zeros(0), torch.float16, "x").dtype == torch.float16
