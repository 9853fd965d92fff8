"""Read FP8 weights that have scales beside them, by tensor, by row or by block.

weight = code * scale, in fp32. A scale is the factor that gives the weight back, whether it is called
`weight_scale` (compressed-tensors, ModelOpt, FBGEMM) or `weight_scale_inv` (DeepSeek).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.quantised import CONFIG, PLAIN, Found, find, quantisation_of
from megatron_troll.weights.tensor_file import NAMES
from megatron_troll.weights.values import cast, check_finite

SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
Size = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """The place of scales on codes [.., rows, columns]: `shape` broadcasts to theirs once its last two axes
    are repeated for each row and column of a `block`."""

    shape: Size
    block: tuple[int, int] = (1, 1)


class Scaled:
    """The weights of a folder with FP8 weights, multiplied by their scales when they are read, in `dtype`;
    None: that of config.json. Scales of activations and of a KV cache are left out.

    Raises ConfigError if a scale does not fit its weight.
    """

    def __init__(self, files: FolderSource, found: Found, dtype: torch.dtype | None) -> None:
        self._files, self._found = files, found
        self._said = quantisation_of(files.folder)
        self._grids = {name: self._grid(name) for name in sorted(found.scaled)}
        self._dtype = dtype or (_dtype(files.folder) if found.scaled else torch.bfloat16)
        self._shapes = {name: shape for name, shape in files.shapes.items() if name not in found.beside}

    @property
    def shapes(self) -> Mapping[str, Size]:
        return self._shapes

    @property
    def remarks(self) -> list[str]:
        """One sentence on what is read and what is left out."""
        parts = []
        if self._found.scaled:
            parts.append(f"{len(self._found.scaled)} FP8 weights are multiplied by their scales")
        for kind, names in (("activations", self._found.inputs), ("an FP8 KV cache", self._found.cache)):
            if names:
                parts.append(f"{len(names)} scales of {kind} (such as {min(names)}) are left out")
        return [f"{self._files.folder} ({self._said}): {', '.join(parts)}; exports are plain weights"]

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._files.files

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._grids else self._files.dtype(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        grid = self._grids.get(name)
        if grid is None:
            return self._files.read(name, index)
        stacked = len(self._shapes[name]) == 3
        codes = self._files.read(name, index if stacked else None)
        scales = self._files.read(self._found.scaled[name]).view(grid.shape).float()
        if stacked and index is not None and len(grid.shape) == 3:
            scales = scales[index]
        tensor = product(codes, scales, grid.block)
        check_finite(tensor, name, self._files.file_of(name))
        tensor = cast(tensor, self._dtype, name)
        return tensor if index is None or stacked else tensor[index]

    def _grid(self, name: str) -> Grid:
        scale, blocks = self._found.scaled[name], self._said.blocks
        shape, there = self._files.shapes[name], self._files.shapes[scale]
        grid, dtype = grid_of(shape, there, blocks), self._files.dtype(scale)
        if grid is not None and dtype in SCALES:
            return grid
        raise ConfigError(
            f"{self._files.file_of(scale)}: {scale} has shape {there} and dtype {NAMES[dtype]}, which are no "
            f"scales of {name}, {shape}: expected one in all, one a row, or one a block "
            f"({', '.join(map(str, sorted(blocks))) or 'config.json names no size of blocks'})"
        )


def open_folder(folder: str | Path, dtype: torch.dtype | None = None) -> FolderSource | Scaled:
    """The weights of a Hugging Face folder. FP8 weights are read in `dtype`, None: that of config.json.
    Raises as FolderSource does, and ConfigError if they are quantised otherwise."""
    files = FolderSource(folder, quantised=True)
    found = find(files.folder, files.stored)
    return Scaled(files, found, dtype) if found.beside else files


def grid_of(codes: Size, scales: Size, blocks: set[tuple[int, int]]) -> Grid | None:
    """The place of scales on codes [.., rows, columns], None if they have none: one in all (or for each
    matrix of a stack), one a row, or one a block; ModelOpt puts axes of length 1 between those of blocks."""
    *stack, rows, columns = codes
    if scales in ((), (1,) * len(scales)):
        return Grid((1, 1))
    if stack and scales in ((*stack,), (*stack, 1), (*stack, 1, 1)):
        return Grid((*stack, 1, 1))
    if scales in ((*stack, rows), (*stack, rows, 1)):
        return Grid((*stack, rows, 1))
    for block in sorted(blocks):
        grid = (*stack, -(-rows // block[0]), -(-columns // block[1]))
        if scales in (grid, (*grid[:-1], 1, grid[-1], 1)):
            return Grid(grid, block)
    return None


def product(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """codes [.., rows, columns] times the scale of each, fp32; scales [.., 1 or rows or grid, 1 or grid] as a
    Grid has them."""
    rows, columns = codes.shape[-2:]
    if block != (1, 1):
        scales = scales.repeat_interleave(block[0], -2)[..., :rows, :]
        scales = scales.repeat_interleave(block[1], -1)[..., :columns]
    return codes.float() * scales


def _dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / CONFIG).read_bytes())
    text = config.get("text_config")
    configs = [config, text if isinstance(text, dict) else {}]
    named = (one.get(key) for one in configs for key in ("dtype", "torch_dtype"))
    name = next(filter(None, named), "bfloat16")
    dtype = getattr(torch, str(name), None)
    if dtype not in PLAIN:
        raise ConfigError(f"{folder / CONFIG}: dtype {name!a} is no dtype of weights")
    return dtype
