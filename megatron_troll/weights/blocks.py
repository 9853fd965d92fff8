"""Dequantise FP8 weights that have a scale for each block, as DeepSeek and Qwen publish them.

weight = code * scale_inv of its block, in fp32, rounded to the dtype that config.json names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.weights.folder import DTYPE_KEYS
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.quantised import CONFIG, PLAIN, refuse_codes, refuse_quantised, settings_of
from megatron_troll.weights.values import cast, check_values

SCALE = "_scale_inv"
CODES = torch.float8_e4m3fn
SCALES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


class BlockScaled:
    """The weights of a folder of block-scaled FP8, dequantised when they are read.

    Raises ConfigError if the folder holds anything else than such weights and plain ones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = FolderSource(folder, quantised=True)
        settings, stored = settings_of(folder), self._folder.stored
        self._block = _block(settings)
        self._scaled = {
            name
            for name, each in stored.items()
            if self._block[0] and each.dtype == CODES and len(each.shape) in (2, 3) and name + SCALE in stored
        }
        if not self._scaled:
            refuse_quantised(folder, stored)
        scales = {name + SCALE for name in self._scaled}
        refuse_codes(folder, {name: stored[name] for name in stored.keys() - self._scaled - scales})
        self._check_grids()
        self.rounded = _dtype(folder)
        self._shapes = {name: each.shape for name, each in stored.items() if name not in scales}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def __str__(self) -> str:
        short = str(self.rounded).removeprefix("torch.")
        return f"dequantised {len(self._scaled)} tensors of block-scaled FP8 to {short}"

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._folder.files

    def dtype(self, name: str) -> torch.dtype:
        return self.rounded if name in self._scaled else self._folder.dtype(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        if name not in self._scaled:
            return self._folder.read(name, index)
        whole = len(self._shapes[name]) == 2
        codes = self._folder.read(name, None if whole else index)
        scales = self._folder.read(name + SCALE, None if whole else index)
        tensor = cast(dequantised(codes, scales, self._block), self.rounded, name)
        check_values(tensor, name, self._folder.file_of(name))
        return tensor if index is None or not whole else tensor[index]

    def _check_grids(self) -> None:
        rows, columns = self._block
        for name in sorted(self._scaled):
            *stack, height, width = self._shapes_of(name)
            wanted = (*stack, -(-height // rows), -(-width // columns))
            found = self._shapes_of(name + SCALE)
            if found != wanted or self._folder.dtype(name + SCALE) not in SCALES:
                raise ConfigError(
                    f"{self._folder.file_of(name)}: {name + SCALE} has shape {found}, and weight_block_size "
                    f"{list(self._block)} needs {wanted} scales for {name}, {self._shapes_of(name)}"
                )

    def _shapes_of(self, name: str) -> tuple[int, ...]:
        return self._folder.shapes[name]


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """codes [.., rows, columns] times the scale of the block of each, fp32."""
    rows, columns = codes.shape[-2:]
    grid = scales.float().repeat_interleave(block[0], -2)[..., :rows, :]
    return codes.float() * grid.repeat_interleave(block[1], -1)[..., :columns]


def is_block_scaled(folder: Path) -> bool:
    """Whether the settings of a folder are those of block-scaled FP8."""
    return settings_of(folder).get("quant_method") == "fp8"


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return 0, 0


def _dtype(folder: Path) -> torch.dtype:
    config = json.loads((folder / CONFIG).read_bytes())
    places = (config, config.get("text_config") or {})
    name = next((each[key] for each in places for key in DTYPE_KEYS if each.get(key)), "bfloat16")
    dtype = getattr(torch, str(name), None)
    if dtype not in PLAIN:
        raise ConfigError(f"{folder / CONFIG}: dtype {name!a} is no dtype of weights")
    return dtype
