"""A model with a vision tower and prediction heads: what is not trained goes through, and every form of
experts comes back as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_troll.config import ConfigError
from megatron_troll.convert.plan import Options
from megatron_troll.convert.to_hugging_face import ToHuggingFace
from megatron_troll.convert.to_megatron import ToMegatron
from megatron_troll.mcore.shape import read_shape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.original import original
from megatron_troll.weights.source import check_folder, check_random
from tests.dist.tiny import reference, write_reference
from tests.dist.tiny_families import QWEN3_5_MOE, QWEN3_5_TEXT, VISION
from tests.unit.convert.tiny_folders import (
    SMALL,
    assert_equal,
    read_all,
    run,
    to_hugging_face,
    to_megatron,
    write_folder,
)

TEXT, HEADS = "model.language_model.layers.{l}.mlp.experts.", "mtp.layers.0.mlp.experts."
DENSE = {
    "model_type": "qwen3_5",
    "text_config": QWEN3_5_TEXT,
    "vision_config": VISION,
    "tie_word_embeddings": False,
}
BFLOAT16 = {
    name: config | {"text_config": config["text_config"] | {"dtype": "bfloat16"}}
    for name, config in {"experts": QWEN3_5_MOE, "dense": DENSE}.items()
}


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors as published: Hugging Face's of a tiny model, its experts apart, with prediction heads; bf16
    but for the decay rates."""
    tensors = {name: tensor.detach() for name, tensor in reference(config).state_dict().items()}
    mtp = {"mtp.fc.weight": torch.randn(48, 96), "mtp.norm.weight": torch.randn(48)}
    for name in [name for name in tensors if ".layers.1." in name and ".experts." in name]:
        mtp[name.replace("model.language_model.layers.1.", "mtp.layers.0.")] = tensors[name] + 1
    rounded = {
        name: tensor if name.endswith("A_log") else tensor.bfloat16()
        for name, tensor in (tensors | mtp).items()
    }
    return apart(rounded)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        start, stacked, kind = name.partition(".experts.")
        if not stacked:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            pieces = (matrix,) if kind == "down_proj" else matrix.chunk(2)
            for piece, kind_of in zip(
                pieces, ("down",) if kind == "down_proj" else ("gate", "up"), strict=True
            ):
                found[f"{start}.experts.{expert}.{kind_of}_proj.weight"] = piece.clone()
    return found


def stack(tensors: dict[str, Tensor], prefix: str, *kinds: str) -> dict[str, Tensor]:
    """The same with the experts under `prefix` in one tensor for each of `kinds` (gate_up, down)."""
    found = dict(tensors)
    for kind in kinds:
        names = [[f"{prefix}{e}.{each}_proj.weight" for each in kind.split("_")] for e in range(8)]
        found[f"{prefix}{kind}_proj"] = torch.stack(
            [torch.cat([found.pop(name) for name in of_expert]) for of_expert in names]
        )
    return found


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's experts stacked, as in Qwen3.5-35B-A3B."""
    for layer in range(4):
        tensors = stack(tensors, TEXT.format(l=layer), "gate_up", "down")
    return tensors


def all_fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the prediction heads too, as in Qwen3.6."""
    return stack(fused(tensors), HEADS, "gate_up", "down")


def mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half of the experts of two layers, and all of the prediction heads."""
    tensors = stack(stack(tensors, TEXT.format(l=2), "gate_up"), TEXT.format(l=3), "down")
    return stack(tensors, HEADS, "gate_up", "down")


def kept(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each expert by itself, as in releases in FP8 and as transformers writes them."""
    return tensors


def published(config: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> Path:
    write_folder(config, folder, tensors)
    # A layout of its own, to see whether the file is copied.
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("form", [fused, all_fused, kept, mixed])
def test_every_form_comes_back_bit_for_bit(
    form: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    config = BFLOAT16["experts"]
    source = published(config, tmp_path / "hf", form(tensors_of(config)))
    there = to_megatron(source, tmp_path / "mcore")
    for number, like in enumerate((there, source)):
        conversion, back = ToHuggingFace(there, like, SMALL), tmp_path / f"back{number}"
        run(conversion, back)
        assert_equal(read_all(back), read_all(source))
        for name in ("config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
            assert (back / name).read_bytes() == (source / name).read_bytes()
        said = json.loads((back / "conversion.json").read_text())["not_trained"]
        assert said == conversion.remarks[:2]
        heads = 2 + (2 if form in (all_fused, mixed) else 24)
        assert f"mtp.* (prediction heads): not trained, as in {like} (tensors: {heads})" in said
    check_folder(source, read_shape(source))


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    text = BFLOAT16["dense"]["text_config"] | {"tie_word_embeddings": tied}
    config = BFLOAT16["dense"] | {"text_config": text, "tie_word_embeddings": tied}
    tensors = tensors_of(config)
    if tied:
        del tensors["lm_head.weight"]  # it is the embedding
    source = published(config, tmp_path / "hf", tensors)
    back = to_hugging_face(to_megatron(source, tmp_path / "mcore"), tmp_path / "back")
    assert_equal(read_all(back), read_all(source))
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_config_names_another_dtype_where_it_named_one(tmp_path: Path) -> None:
    config = BFLOAT16["dense"]
    source = published(config, tmp_path / "hf", tensors_of(config))
    there = to_megatron(source, tmp_path / "mcore", Options(torch.float32, SMALL.shard_bytes))
    written = json.loads((there / "config.json").read_text())
    assert written == config | {"text_config": config["text_config"] | {"dtype": "float32"}}


@torch.no_grad()
def test_an_export_is_the_model_of_hugging_face(tmp_path: Path) -> None:
    model, ids = write_reference(QWEN3_5_MOE, tmp_path / "hf"), torch.arange(12)[None]
    back = to_hugging_face(to_megatron(tmp_path / "hf", tmp_path / "mcore"), tmp_path / "back")
    again = AutoModelForImageTextToText.from_pretrained(back, attn_implementation="eager")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        again.get_parameter("model.visual.pos_embed.weight"),
        model.get_parameter("model.visual.pos_embed.weight"),
    )


def test_experts_in_both_forms_are_refused(tmp_path: Path) -> None:
    tensors = tensors_of(QWEN3_5_MOE)
    source = write_folder(QWEN3_5_MOE, tmp_path / "hf", fused(tensors) | tensors)
    with pytest.raises(
        ConfigError, match=r"unused: model\.language_model\.layers\.0\.mlp\.experts\.gate_up_proj"
    ):
        ToMegatron(source, SMALL)


def test_block_scaled_fp8_is_dequantised_in_text_and_heads(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = BFLOAT16["experts"] | {"quantization_config": settings}
    tensors, quantised = tensors_of(config), {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            quantised[name] = tensor
            continue
        grid = tuple(-(-size // 16) for size in tensor.shape)
        codes, scales = (tensor.float() * 100).to(torch.float8_e4m3fn), torch.rand(grid).bfloat16()
        quantised |= {name: codes, f"{name}_scale_inv": scales}
        whole = scales.float().repeat_interleave(16, 0)[: tensor.shape[0]].repeat_interleave(16, 1)
        tensors[name] = (codes.float() * whole[:, : tensor.shape[1]]).bfloat16()
    source = published(config, tmp_path / "hf", quantised)
    conversion = ToMegatron(source, SMALL)
    (remark,) = conversion.remarks
    assert "120 FP8 weights are multiplied by their scales" in remark
    run(conversion, tmp_path / "mcore")
    back = to_hugging_face(tmp_path / "mcore", tmp_path / "back")
    assert_equal(read_all(back), tensors)
    assert json.loads((back / "config.json").read_text()) == BFLOAT16["experts"]
    # The export of a run takes over the same.
    carried = original(source, table_of(read_shape(source))).carried
    assert_equal(
        {name: carried.source.read(name) for name in carried.names},
        {name: tensor for name, tensor in tensors.items() if name.startswith(("mtp.", "model.visual."))},
    )


def test_a_folder_without_weights_gives_no_vision_tower(tmp_path: Path) -> None:
    source = published(BFLOAT16["dense"], tmp_path / "hf", tensors_of(BFLOAT16["dense"]))
    table = table_of(read_shape(source))
    assert original(source, table).untrained.keys() == {"mtp.", "model.visual."}
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"{source} has no weights: an export takes the vision tower"):
        original(source, table)


def test_a_vision_tower_is_not_drawn(tmp_path: Path) -> None:
    published(BFLOAT16["dense"], tmp_path / "hf", {})
    with pytest.raises(
        ConfigError, match="init=random: a qwen3_5 has a vision tower, which is not made here"
    ):
        check_random(read_shape(tmp_path / "hf"))
