"""Tiny models in folders of both formats."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_troll.convert.plan import Conversion, Options
from megatron_troll.convert.progress import NoProgress
from megatron_troll.convert.run import convert
from megatron_troll.convert.to_hugging_face import ToHuggingFace
from megatron_troll.convert.to_megatron import ToMegatron
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import ALONE
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.source import RandomSource
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import APERTUS, QWEN2, QWEN3_5_TEXT

# Files of this size are many in a tiny model.
SMALL = Options(shard_bytes=100_000)
MODELS = {"dense": DENSE, "moe": MOE, "tied": MOE | {"tie_word_embeddings": True}, "hybrid": NEXT}
MODELS |= {"qwen2": QWEN2, "apertus": APERTUS, "dense hybrid": QWEN3_5_TEXT}
MTP = {"mtp.fc.weight": torch.randn(48, 96), "mtp.layers.0.count": torch.arange(3)}


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors of a model, in fp32, with those that it carries."""
    source, generator = RandomSource(shape_of(config), seed=0), torch.Generator().manual_seed(0)
    carried = MTP if shape_of(config).linear else {}
    noise = {name: 0.1 * torch.rand(shape, generator=generator) for name, shape in source.shapes.items()}
    return {name: source.read(name) + noise[name] for name in source.shapes} | carried


def write_folder(config: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    save_file(tensors, folder / "model.safetensors")
    return folder


def to_megatron(source: Path, target: Path, options: Options = SMALL) -> Path:
    run(ToMegatron(source, options), target)
    return target


def to_hugging_face(source: Path, target: Path, options: Options = SMALL) -> Path:
    run(ToHuggingFace(source, source, options), target)
    return target


def run(conversion: Conversion, target: Path) -> bool:
    return convert(conversion, target, ALONE, NoProgress())


def read_all(folder: Path) -> dict[str, Tensor]:
    source = FolderSource(folder)
    return {name: source.read(name) for name in source.shapes}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
