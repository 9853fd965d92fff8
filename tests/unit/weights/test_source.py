"""Readers of full tensors, and the strict check of what they hold."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_sums import SumsError, sums_of, write_sums
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import ALONE
from megatron_troll.weights.families import table_of
from megatron_troll.weights.folder_source import INDEX, SINGLE, FolderSource
from megatron_troll.weights.source import RandomSource, TensorSource, Unstacked, check, open_checked
from tests.dist.tiny import MOE, NEXT
from tests.dist.tiny_families import APERTUS, LLAMA, QWEN2

SHAPE = shape_of(MOE)
TABLE = table_of(SHAPE)
GATE, UP, DOWN = (f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up", "down"))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A whole checkpoint in the published format."""
    source = RandomSource(SHAPE, seed=0)
    return {name: source.read(name) for name in source.shapes}


def write_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_random_hybrid_starts_as_hugging_face_says() -> None:
    """Zero-centred norms at 0, the norm inside linear attention at 1, decay rates spread over (0, 16)."""
    source = RandomSource(shape_of(NEXT | {"linear_num_value_heads": 400}), seed=0)
    layer = "model.layers.0."
    assert (source.read(layer + "input_layernorm.weight") == 0).all()
    assert (source.read("model.layers.1.self_attn.q_norm.weight") == 0).all()
    assert (source.read(layer + "linear_attn.norm.weight") == 1).all()
    assert (source.read(layer + "linear_attn.dt_bias") == 1).all()
    rates = source.read(layer + "linear_attn.A_log").exp()
    assert rates.mean().item() == pytest.approx(8, abs=1)
    assert 0 < rates.min() < rates.max() < 16


@pytest.mark.parametrize("config", [LLAMA, QWEN2, APERTUS], ids=lambda config: config["model_type"])
def test_a_random_start_is_drawn_as_hugging_face_draws_it(config: dict[str, Any]) -> None:
    """What is constant there has the same value here, what is drawn the same spread."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    source = RandomSource(shape_of(config), seed=0)
    for name, tensor in theirs.state_dict().items():
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:
            constant = tensor.dim() < 2
            wanted = tensor if constant else tensor.std()
            found = source.read(name) if constant else source.read(name).std()
            torch.testing.assert_close(found, wanted, rtol=0 if constant else 0.1, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_gives_back_its_tensors(tmp_path: Path, tensors: dict[str, Tensor], sharded: bool) -> None:
    if sharded:
        write_sharded(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    source = FolderSource(tmp_path)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
    assert torch.equal(source.read(GATE, 5), tensors[GATE][5])


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors\.index\.json or model\.safetensors"):
        FolderSource(tmp_path)


def test_a_missing_file_and_a_stale_index_are_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    lost = sorted(tensors)[0::2]
    save_file({name: tensors[name] for name in lost[3:]}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="lists tensors that their files lack") as caught:
        FolderSource(tmp_path)
    assert str(caught.value).split("\n  ")[1:] == lost[:3]
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists files that are missing: b\.safetensors"):
        FolderSource(tmp_path)


def test_every_broken_file_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    os.truncate(tmp_path / "a.safetensors", 1000)
    (tmp_path / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(
        ValueError, match=r"(?s)a\.safetensors is cut short.*b\.safetensors is a git-lfs pointer"
    ):
        FolderSource(tmp_path)


def test_an_index_that_is_none_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        FolderSource(tmp_path)


def test_a_tensor_in_two_files_is_that_of_the_index(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    names = sorted(tensors)
    other = {name: tensors[name] for name in names[1::2]} | {names[0]: torch.zeros_like(tensors[names[0]])}
    save_file(other, tmp_path / "b.safetensors")
    assert torch.equal(FolderSource(tmp_path).read(names[0]), tensors[names[0]])


def test_shards_without_an_index_are_told(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    write_sharded(tmp_path, tensors)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        FolderSource(tmp_path)
    assert f"{INDEX} is missing in {tmp_path}, which has a.safetensors, b.safetensors:" in str(caught.value)


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "x/../../y", "a\x1b[31m"])
def test_an_index_that_leads_out_of_its_folder_is_refused(
    file: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    with pytest.raises(ConfigError, match="which is not a file in its folder") as caught:
        FolderSource(folder)
    assert ascii(file) in str(caught.value)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_an_index_without_files_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ConfigError, match=r"index\.json cannot be read"):
        FolderSource(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """Hugging Face reads the single file, SGLang every file."""
    write_sharded(tmp_path, tensors)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match=r"has both model\.safetensors and model\.safetensors\.index"):
        FolderSource(tmp_path)


def test_random_tensors_depend_on_seed_and_name_alone() -> None:
    source = RandomSource(SHAPE, seed=1)
    assert torch.equal(source.read(GATE), RandomSource(SHAPE, seed=1).read(GATE))
    assert not torch.equal(source.read(GATE), source.read(UP))
    assert not torch.equal(source.read(GATE), RandomSource(SHAPE, seed=2).read(GATE))
    assert source.read("model.embed_tokens.weight").std().item() == pytest.approx(SHAPE.init_std, rel=0.05)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(SHAPE.hidden))


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout of transformers 5 in memory, by its definition: [E, 2F, H] and [E, H, F]."""
    merged = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(SHAPE.layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{prefix}{expert}.{name}_proj.weight"] for expert in range(SHAPE.experts)])
            for name in ("gate", "up", "down")
        )
        merged[prefix + "gate_up_proj"] = torch.cat([gate, up], 1)
        merged[prefix + "down_proj"] = down
    return merged


def test_stacked_experts_are_read_one_by_one(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(stacked(tensors), tmp_path / "model.safetensors")
    source = Unstacked(FolderSource(tmp_path), TABLE)
    check(source, TABLE, tied=False)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_everything_that_does_not_fit_is_listed_at_once(tensors: dict[str, Tensor]) -> None:
    del tensors[GATE], tensors["model.norm.weight"]
    tensors[UP] = torch.zeros(2, 3)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"do not fit config\.json") as caught:
        check(TensorSource(tensors), TABLE, tied=False)
    assert str(caught.value).split("\n  ")[1:] == [
        "missing: model.norm.weight (48,)",
        f"missing: {GATE} (24, 48)",
        "unused: model.layers.0.self_attn.q_proj.bias (4,)",
        f"wrong shape: {UP} (2, 3), the config says (24, 48)",
    ]


def test_a_misshapen_stack_is_reported(tensors: dict[str, Tensor]) -> None:
    merged = stacked(tensors)
    merged["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(7, 48, 48)
    merged["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 47, 48)
    with pytest.raises(ValueError, match=r"missing: .*0\.mlp\.experts\.7\.gate_proj") as caught:
        check(Unstacked(TensorSource(merged), TABLE), TABLE, tied=False)
    assert "unused: model.layers.1.mlp.experts.gate_up_proj (8, 47, 48)" in str(caught.value)


def test_a_superfluous_head_is_taken_only_where_it_is_tied(tensors: dict[str, Tensor]) -> None:
    tied = table_of(shape_of(MOE | {"tie_word_embeddings": True}))
    check(TensorSource(tensors), tied, tied=True)
    with pytest.raises(ValueError, match=r"unused: lm_head\.weight"):
        check(TensorSource(tensors), tied, tied=False)


def test_weights_that_are_not_as_they_were_summed_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    file = tmp_path / SINGLE
    save_file(tensors, file)
    write_sums(tmp_path, sums_of(tmp_path, [SINGLE]))
    assert open_checked(tmp_path, SHAPE, ALONE).shapes == RandomSource(SHAPE, 0).shapes
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SumsError, match=f"{file}: not as .*SHA256SUMS says"):
        open_checked(tmp_path, SHAPE, ALONE)
