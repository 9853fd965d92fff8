"""Write a Hugging Face folder from a GGUF file."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.convert.gguf.metadata import ROPE_FACTORS, GGUFFile, config_of
from megatron_troll.convert.gguf.tokenizer import tokenizer_of
from megatron_troll.mcore.checkpoint_sums import sum_of, sums_of, write_sums
from megatron_troll.mcore.shape import ModelShape, shape_of
from megatron_troll.weights.families import table_of
from megatron_troll.weights.folder import CONFIG, GENERATION_CONFIG, FolderWriter, check_target
from megatron_troll.weights.table import HFTensor, Place

SHARD_BYTES = 4 * 2**30


def write_folder(path: Path, target: Path, dtype: torch.dtype, sha256: str | None = None) -> None:
    """Write the model of the GGUF file `path`, dequantised to `dtype`, to the folder `target` as safetensors,
    config and tokenizer, with SHA-256 sums. Holds one file of at most 4 GiB in memory.

    Raises ConfigError, before anything is written, if the file's sum is not `sha256`, if something in it is
    damaged or not supported, or if `target` holds something.
    """
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: convert to another folder")
    if sha256 is not None and (found := sum_of(path)) != sha256.lower():
        raise ConfigError(f"{path}: its SHA-256 is {found}, not {sha256}: download it again")
    file = GGUFFile(path)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        config = config_of(file)
        (source / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shape = shape_of(config, str(path))
        tensors = _named_tensors(file, shape)
        tokenizer_of(file).save_pretrained(source)
        ends = {
            f"{role}_token_id": file.get(f"tokenizer.ggml.{key}_token_id")
            for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        (source / GENERATION_CONFIG).write_text(json.dumps(ends, indent=2) + "\n")
        check_target(target, source)
        with FolderWriter(target, source, SHARD_BYTES) as writer:
            for hf, (tensor, place) in tensors.items():
                writer.add(hf, _read(file, tensor, place, shape, hf).to(dtype))
    files = [item.name for item in sorted(target.iterdir()) if item.suffix == ".safetensors"]
    write_sums(target, sums_of(target, files))


def _named_tensors(file: GGUFFile, shape: ModelShape) -> dict[str, tuple[str, Place]]:
    """The GGUF tensor of each Hugging Face tensor, by name. Raises ConfigError for tensors that are missing,
    left over or wrongly shaped."""
    known = gguf.get_tensor_name_map(_architecture(file), shape.layers)
    found: dict[str, tuple[str, Place]] = {}
    wrong: list[str] = []
    for place, name, tensor in _tensors(shape):
        theirs = known.get_name(name.replace(f".experts.{place.expert}.", ".experts."), (".weight", ".bias"))
        if theirs not in file.tensors:
            wrong.append(f"{theirs} ({name}) is missing")
            continue
        expected = tensor.shape if place.expert is None else (shape.experts, *tensor.shape)
        stored = tuple(int(size) for size in reversed(file.tensors[theirs].shape))
        if stored != expected:
            wrong.append(f"{theirs} ({name}) is {stored} instead of {expected}")
        found[name] = (theirs, place)
    used = {theirs for theirs, _ in found.values()} | {ROPE_FACTORS}
    wrong += [f"{name} belongs to no tensor of the model" for name in file.tensors if name not in used]
    if wrong:
        raise ConfigError(f"{file.path}: " + "\n  ".join(wrong[:10]))
    return found


def _architecture(file: GGUFFile) -> gguf.MODEL_ARCH:
    by_name = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    return by_name[file["general.architecture"]]


def _tensors(shape: ModelShape) -> Iterator[tuple[Place, str, HFTensor]]:
    for place in table_of(shape).places():
        if not place.entry.copy:
            for name, tensor in zip(place.names, place.entry.hf, strict=True):
                yield place, name, tensor


def _read(file: GGUFFile, name: str, place: Place, shape: ModelShape, hf: str) -> Tensor:
    """One Hugging Face tensor, float32."""
    stored = file.tensors[name]
    data = stored.data if place.expert is None else stored.data[place.expert]
    try:
        values = gguf.quants.dequantize(data, stored.tensor_type)
    except NotImplementedError as error:
        raise ConfigError(f"{file.path}: {name} is stored as {stored.tensor_type.name}: {error}") from error
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(hf.split(".")[-2])
    return _halves(tensor, heads) if file.architecture.pairs and heads else tensor


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, from llama.cpp's order, in which neighbours rotate together, to that of
    Hugging Face, in which the halves of a head do."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
