"""Whole conversions of tiny models, both ways. Real Megatron checkpoints: tests/dist/test_conversion.py."""

import json
import math
import pickle
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.convert.plan import Options
from megatron_troll.convert.to_hugging_face import ToHuggingFace, companions_of
from megatron_troll.convert.to_megatron import ToMegatron
from megatron_troll.launch.plan.models import PUBLISHED
from megatron_troll.mcore.checkpoint_sums import SUMS, SumsError
from megatron_troll.mcore.shape import read_shape, shape_of
from megatron_troll.weights.source import open_source
from megatron_troll.weights.torch_dist import (
    Chunk,
    SavedTensor,
    SavedTensors,
    TensorsError,
    write_chunk,
    write_index,
)
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.unit.convert.tiny_folders import (
    MODELS,
    MTP,
    SMALL,
    assert_equal,
    read_all,
    run,
    tensors_of,
    to_hugging_face,
    to_megatron,
    write_folder,
)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_equal(name: str, tmp_path: Path) -> None:
    tensors = tensors_of(MODELS[name])
    source = write_folder(MODELS[name], tmp_path / "hf", tensors)
    there = to_megatron(source, tmp_path / "mcore")
    back = to_hugging_face(there, tmp_path / "back")
    assert len(list((there / "tensors").glob("*.distcp"))) > 2
    assert len(list(back.glob("*.safetensors"))) > 2
    assert_equal(read_all(back), tensors)
    for folder in (there, back):
        assert json.loads((folder / "config.json").read_text()) == MODELS[name] | {"dtype": "float32"}
        assert (folder / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("folder", ["mcore", "back"])
def test_sums_are_those_of_every_file(folder: str, tmp_path: Path) -> None:
    source = write_folder(NEXT, tmp_path / "hf", tensors_of(NEXT))
    to_hugging_face(to_megatron(source, tmp_path / "mcore"), tmp_path / "back")
    target = tmp_path / folder
    listed = [line.split("  ")[1] for line in (target / "SHA256SUMS").read_text().splitlines()]
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert sorted([*listed, "SHA256SUMS"]) == files
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=target, check=True)


def mixed(config: dict[str, Any]) -> dict[str, Tensor]:
    """bf16, but for the router and what else a model keeps in fp32."""
    kept = ("mlp.gate.weight", "A_log", "layers.1.input_layernorm.weight")
    return {
        name: tensor if name.endswith(kept) or name in MTP else tensor.bfloat16()
        for name, tensor in tensors_of(config).items()
    }


def test_dtypes_are_kept_where_layers_agree(tmp_path: Path) -> None:
    tensors = mixed(NEXT)
    source = write_folder(NEXT, tmp_path / "hf", tensors)
    back = to_hugging_face(to_megatron(source, tmp_path / "mcore"), tmp_path / "back", Options())
    assert_equal(read_all(back), tensors)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_layers_that_share_a_tensor_must_agree_on_its_dtype(tmp_path: Path) -> None:
    source = write_folder(MOE, tmp_path / "hf", mixed(MOE))
    with pytest.raises(ValueError, match=r"different dtypes, choose one \(--dtype\)") as caught:
        ToMegatron(source, SMALL)
    (key,) = str(caught.value).splitlines()[1:]
    assert key == "  decoder.layers.self_attention.linear_qkv.layer_norm_weight: bfloat16, float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_can_be_chosen_in_either_direction(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = mixed(NEXT)
    source = write_folder(NEXT, tmp_path / "hf", tensors)
    chosen = Options(dtype, SMALL.shard_bytes)
    first = to_hugging_face(to_megatron(source, tmp_path / "a", chosen), tmp_path / "b")
    second = to_hugging_face(to_megatron(source, tmp_path / "c"), tmp_path / "d", chosen)
    expected = {name: tensor if name in MTP else tensor.to(dtype) for name, tensor in tensors.items()}
    assert_equal(read_all(first), expected)
    assert_equal(read_all(second), expected)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = tensors_of(MOE)
    source = write_folder(MOE, tmp_path / "hf", tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match="quantised") as caught:
        ToMegatron(source, SMALL)
    assert f"the weights are quantised (by an unknown tool), e.g. {name!r} F8_E4M3" in str(caught.value)


def test_block_scaled_fp8_is_dequantised_and_said(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = {key: tensor.bfloat16() for key, tensor in tensors_of(MOE).items()}
    codes, scales = (tensors[name].float() * 1000).to(torch.float8_e4m3fn), torch.rand(3, 8)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = MOE | {"dtype": "bfloat16", "quantization_config": settings}
    quantised = tensors | {name: codes, f"{name}_scale_inv": scales}
    source = write_folder(config, tmp_path / "hf", quantised)
    conversion = ToMegatron(source, SMALL)
    (said,) = conversion.remarks
    assert said.endswith("1 FP8 weights are multiplied by their scales; exports are plain weights")
    run(conversion, tmp_path / "mcore")
    back = to_hugging_face(tmp_path / "mcore", tmp_path / "back")
    expected = codes.float() * scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert_equal(read_all(back), tensors | {name: expected.bfloat16()})
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    wide = to_hugging_face(to_megatron(source, tmp_path / "a", Options(torch.float32)), tmp_path / "b")
    assert torch.equal(read_all(wide)[name], expected)


def test_fp8_weights_that_are_carried_are_plain_in_every_export(tmp_path: Path) -> None:
    name = next(key for key, tensor in tensors_of(NEXT).items() if key in MTP and tensor.dim() == 2)
    tensors = tensors_of(NEXT)
    codes = torch.ones_like(tensors[name]).to(torch.float8_e4m3fn)
    producer = {"quant_method": "modelopt", "quant_algo": "FP8"}
    config = NEXT | {"dtype": "float32", "quantization_config": producer}
    quantised = tensors | {name: codes, f"{name}_scale": torch.tensor(0.25)}
    source = write_folder(config, tmp_path / "hf", quantised)
    back = to_hugging_face(to_megatron(source, tmp_path / "mcore"), tmp_path / "back")
    assert_equal(read_all(back), tensors | {name: torch.full_like(tensors[name], 0.25)})


def test_settings_of_quantisation_in_the_companions_are_left_out_and_said(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors), tmp_path / "mcore")
    like = write_folder(MOE | {"quantization_config": {"quant_method": "gptq"}}, tmp_path / "like", {})
    conversion = ToHuggingFace(there, like, SMALL)
    (said,) = conversion.remarks
    assert said.startswith(
        "config.json is without its quantisation (GPTQ; quantization_config of config.json)"
    )
    run(conversion, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()).keys() == {*MOE, "dtype"}


@pytest.mark.parametrize("bad", [float("nan"), 1e6])
def test_values_that_the_target_cannot_hold_are_refused_by_name(bad: float, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = tensors_of(MOE)
    good = to_megatron(write_folder(MOE, tmp_path / "hf", tensors), tmp_path / "mcore")
    tensors[name][3, 4] = bad
    source, halves = write_folder(MOE, tmp_path / "bad", tensors), Options(torch.float16)
    why = "are not finite" if math.isnan(bad) else "do not fit into float16"
    with pytest.raises(ConfigError, match=f"1 .*{why}"):
        to_megatron(source, tmp_path / "out", halves)
    with pytest.raises(ConfigError, match=f"1 .*{why}"):
        to_hugging_face(replace_weight(good, tensors[name]), tmp_path / "back", halves)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "back").exists()


def replace_weight(folder: Path, tensor: Tensor) -> Path:
    """A converted folder with the output projection of layer 2 replaced."""
    key = "decoder.layers.self_attention.linear_proj.weight"
    tensors = dict(SavedTensors(folder / "tensors").tensors)
    saved, start = tensors[key], (2, 0, 0)
    with open(folder / "tensors" / "other.distcp", "wb") as file:
        offset, length = write_chunk(file, tensor[None])
    others = [chunk for chunk in saved.chunks if chunk.start != start]
    chunks = (*others, Chunk(start, (1, *tensor.shape), "other.distcp", offset, length))
    write_index(folder / "tensors", tensors | {key: SavedTensor(saved.dtype, saved.shape, chunks)})
    (folder / SUMS).unlink()
    return folder


def test_one_changed_bit_of_a_source_is_found_by_its_own_checksums(tmp_path: Path) -> None:
    source = write_folder(MOE, tmp_path / "hf", tensors_of(MOE))
    there = to_megatron(source, tmp_path / "mcore")
    back = to_hugging_face(there, tmp_path / "back")
    for folder, file in ((there, "tensors/shard_00002.distcp"), (there, "tensors/.metadata")):
        with flipped(folder / file), pytest.raises((SumsError, TensorsError), match=re.escape(file)):
            to_hugging_face(folder, tmp_path / "out")
    file = sorted(path.name for path in back.glob("*.safetensors"))[1]
    with flipped(back / file), pytest.raises(SumsError, match=f"^{back / file}: not as {back / SUMS} says"):
        to_megatron(back, tmp_path / "out")
    with flipped(there / "tensors/shard_00002.distcp"), pytest.raises(SumsError, match="shard_00002"):
        to_megatron(source, there)  # finished before, and damaged since
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mcore", "back"}
    assert_equal(read_all(to_hugging_face(there, tmp_path / "out")), tensors_of(MOE) | read_all(back))
    assert "has no SHA256SUMS" not in str(ToHuggingFace(there, there, SMALL).remarks)


@contextmanager
def flipped(file: Path) -> Iterator[None]:
    """Change one bit of a file until the block ends."""
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-len(content) // 3] ^= 1
    file.write_bytes(changed)
    try:
        yield
    finally:
        file.write_bytes(content)


def test_a_source_without_checksums_is_converted_and_said(tmp_path: Path) -> None:
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors_of(MOE)), tmp_path / "mcore")
    (there / SUMS).unlink()
    conversion = ToHuggingFace(there, there, SMALL)
    assert conversion.remarks == [f"{there} has no SHA256SUMS: its content was not checked"]
    assert run(conversion, tmp_path / "back")


def test_the_trainer_reads_a_converted_folder_like_the_original(tmp_path: Path) -> None:
    source = write_folder(MOE, tmp_path / "hf", tensors_of(MOE))
    there = open_source(to_megatron(source, tmp_path / "mcore"), read_shape(source))
    original = open_source(source, read_shape(source))
    assert there.shapes == original.shapes
    assert {there.dtype(name) for name in there.shapes} == {torch.float32}
    assert all(torch.equal(there.read(name), original.read(name)) for name in original.shapes)
    norm = "model.layers.1.mlp.gate.weight"
    assert torch.equal(there.read(norm, 3), original.read(norm)[3])


def test_tensors_that_do_not_fit_are_all_listed_and_nothing_is_written(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(7, 7)
    source = write_folder(MOE, tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=r"do not fit config\.json") as caught:
        ToMegatron(source, SMALL)
    assert str(caught.value).split("\n  ")[1:] == [
        "missing: model.norm.weight (48,)",
        "unused: model.layers.0.self_attn.q_proj.bias (3,)",
        "wrong shape: lm_head.weight (7, 7), the config says (131, 48)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_mtp_of_a_model_that_has_none_is_not_dropped_silently(tmp_path: Path) -> None:
    source = write_folder(MOE, tmp_path / "hf", tensors_of(MOE) | MTP)
    with pytest.raises(ValueError, match=r"unused: mtp\.fc\.weight"):
        ToMegatron(source, SMALL)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    source = write_folder(DENSE | {"model_type": "mistral"}, tmp_path / "hf", tensors_of(DENSE))
    with pytest.raises(ValueError, match="model_type 'mistral' is not supported"):
        ToMegatron(source, SMALL)


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(tmp_path: Path) -> None:
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors_of(MOE)), tmp_path / "mcore")
    other = MOE | {"vocab_size": 140, "num_key_value_heads": 8}
    like = write_folder(other, tmp_path / "like", {})
    with pytest.raises(ValueError, match="does not hold the model") as caught:
        ToHuggingFace(there, like, SMALL)
    assert str(caught.value).split("\n  ")[1:] == [
        "wrong shape: embedding.word_embeddings.weight (131, 48), the config says (140, 48)",
        "wrong shape: output_layer.weight (131, 48), the config says (140, 48)",
        "wrong shape: decoder.layers.self_attention.linear_qkv.weight (4, 256, 48), "
        "the config says (4, 384, 48)",
    ]
    dense = write_folder(DENSE, tmp_path / "dense", {})
    with pytest.raises(ValueError, match=r"missing: decoder\.layers\.mlp\.linear_fc1\.weight") as caught:
        ToHuggingFace(there, dense, SMALL)
    assert "unused: decoder.layers.mlp.router.weight (4, 8, 48)" in str(caught.value)


def test_a_folder_without_checkpoint_or_config_is_told_what_to_give(tmp_path: Path) -> None:
    like = write_folder(MOE, tmp_path / "hf", tensors_of(MOE))
    with pytest.raises(
        FileNotFoundError,
        match=r"give one step of a run, .* or a folder that `mtroll convert hf2mcore` wrote",
    ):
        ToHuggingFace(like, like, SMALL)
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json and is not one step of a run, .*: give --like"
    ):
        companions_of(tmp_path)


def test_what_a_run_began_with_is_its_companion(tmp_path: Path) -> None:
    step = tmp_path / "runs" / "x" / "checkpoints" / "step_000010"
    step.mkdir(parents=True)
    model = tmp_path / "model"
    config = f"name: x\nmodels: {{policy: {{path: {model}}}}}\n"
    (tmp_path / "runs" / "x" / "config.yaml").write_text(config)
    with pytest.raises(FileNotFoundError, match=f"{model}, which the run of .* began with, .*give --like"):
        companions_of(step)
    write_folder(MOE, model, {})
    assert companions_of(step) == model


def test_a_model_of_every_size_is_planned_from_headers() -> None:
    from megatron_troll.convert.plan import cut_parameters
    from megatron_troll.weights.families import table_of

    config = json.loads((PUBLISHED / "Qwen3-30B-A3B" / "config.json").read_text())
    shards = cut_parameters(table_of(shape_of(config)), lambda place: torch.bfloat16, 4 * 2**30)
    assert sum(shard.nbytes for shard in shards) == 2 * 30_532_122_624
    assert max(shard.nbytes for shard in shards) <= 4 * 2**30
    assert len(shards) == 15


def with_bias(folder: Path) -> str:
    """Add a tensor to a checkpoint that Hugging Face's format has no place for; its key."""
    key, bias = "decoder.layers.mlp.router.expert_bias", torch.ones(4, 8)
    (folder.parent / SUMS).unlink()
    with open(folder / "bias.distcp", "wb") as file:
        offset, length = write_chunk(file, bias)
    chunk = Chunk((0, 0), (4, 8), "bias.distcp", offset, length)
    write_index(folder, {**SavedTensors(folder).tensors, key: SavedTensor(bias.dtype, (4, 8), (chunk,))})
    return key


def test_what_has_no_place_is_left_out_only_by_name(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors), tmp_path / "mcore")
    key = with_bias(there / "tensors")
    with pytest.raises(ValueError, match=re.escape(f"unused: {key} (4, 8)")):
        ToHuggingFace(there, there, SMALL)
    run(ToHuggingFace(there, there, SMALL, ("router.expert_bias",)), tmp_path / "back")
    assert_equal(read_all(tmp_path / "back"), tensors)


def leave_mark(folder: str) -> None:
    (Path(folder) / "mark").touch()


class Marking:
    """Leaves a mark in `folder` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return leave_mark, (self.folder,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors_of(MOE)), tmp_path / "mcore")
    index = there / "tensors" / ".metadata"
    index.write_bytes(pickle.dumps(Marking(tmp_path)))
    with pytest.raises(TensorsError, match=re.escape(f"{index} cannot be read as the index")) as caught:
        ToHuggingFace(there, there, SMALL)
    assert f"it holds {__name__}.leave_mark, which nothing in a checkpoint needs" in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_states_that_are_not_read_are_no_hindrance(tmp_path: Path) -> None:
    """Another program's common state, which holds its arguments, is not opened."""
    tensors = tensors_of(MOE)
    there = to_megatron(write_folder(MOE, tmp_path / "hf", tensors), tmp_path / "mcore")
    torch.save({"args": Marking(tmp_path)}, there / "tensors" / "common.pt")
    run(ToHuggingFace(there, there, SMALL), tmp_path / "back")
    assert_equal(read_all(tmp_path / "back"), tensors)
    assert not (tmp_path / "mark").exists()


def test_a_checkpoint_of_another_program_needs_a_config_beside_it(tmp_path: Path) -> None:
    tensors = tensors_of(MOE)
    source = write_folder(MOE, tmp_path / "hf", tensors)
    iteration = to_megatron(source, tmp_path / "mcore") / "tensors"
    with pytest.raises(FileNotFoundError, match="give --like"):
        companions_of(iteration)
    run(ToHuggingFace(iteration, source, SMALL), tmp_path / "back")
    assert_equal(read_all(tmp_path / "back"), tensors)
