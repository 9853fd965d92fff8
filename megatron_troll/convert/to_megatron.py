"""Convert a Hugging Face folder to a folder with a Megatron checkpoint that every layout can load."""

from collections import Counter, defaultdict
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_troll.config import ConfigError
from megatron_troll.convert.plan import (
    BothFormats,
    Options,
    TargetFile,
    ahead,
    cut_carried,
    cut_parameters,
    identity_of,
    write_carried,
)
from megatron_troll.mcore.checkpoint_folder import TENSORS
from megatron_troll.mcore.checkpoint_sums import check_folder_sums
from megatron_troll.mcore.shape import read_shape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.folder import CONFIG, file_name, write_companions
from megatron_troll.weights.folder import write_index as write_carried_index
from megatron_troll.weights.megatron_keys import Keys, Size, written_keys
from megatron_troll.weights.original import CARRIED, carried_in, stacked_in, write_stacked
from megatron_troll.weights.scaled import Scaled, open_folder
from megatron_troll.weights.source import Source, Unstacked, check
from megatron_troll.weights.table import Place, Tensors
from megatron_troll.weights.torch_dist import Chunk, SavedTensor, write_chunk, write_index
from megatron_troll.weights.values import cast

WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


class ToMegatron:
    """Conversion to Megatron. Reads only the headers of the source before `write`.

    Raises FileNotFoundError or ValueError if the folder has no supported model, listing every tensor that is
    missing, superfluous or wrongly shaped.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        shape = read_shape(folder)
        files, table = open_folder(folder, options.dtype), table_of(shape)
        self.folder, self.options = folder, options
        self.identity = identity_of("hf2mcore", options, [folder / CONFIG, *files.files])
        self.source, self._files = Unstacked(files, table), files.files
        check(self.source, table, tied=shape.tied)
        self.keys = written_keys(table)
        self.tensors = _tensors(self.keys, self.source, options.dtype)
        self.carried, self.stacked = carried_in(files, table), stacked_in(files, table)
        self.remarks = files.remarks if isinstance(files, Scaled) else []
        parameters = cut_parameters(table, self._dtype, options.shard_bytes)
        carried = cut_carried(self.carried, options.shard_bytes)
        self.shards = {f"{TENSORS}/shard_{i + 1:05d}.distcp": shard for i, shard in enumerate(parameters)}
        self.shards |= {f"{CARRIED}/{file_name(i, len(carried))}": shard for i, shard in enumerate(carried)}

    def check(self, rank: int, size: int) -> None:
        check_folder_sums(self.folder, [file.name for file in self._files], rank, size)

    def write(self, shard: TargetFile, file: BinaryIO) -> Any:
        """Write a file; return key, start, shape, offset and length of each chunk, or None for carried
        tensors."""
        if shard.carried:
            return write_carried(self.carried, shard.carried, file)
        read = ahead((place, self._parts(place)) for place in shard.places)
        return [chunk for place, parts in read for chunk in self._write_parameter(place, parts, file)]

    def complete(self, folder: Path, records: dict[str, Any]) -> None:
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for name, record in records.items():
            for key, start, shape, offset, length in record or ():
                chunk = Chunk(tuple(start), tuple(shape), Path(name).name, offset, length)
                chunks[key].append(chunk)
        write_index(
            folder / TENSORS,
            {key: SavedTensor(*self.tensors[key], tuple(found)) for key, found in chunks.items()},
        )
        sizes: Counter[torch.dtype] = Counter()
        for dtype, whole in self.tensors.values():
            sizes[dtype] += prod(whole) * dtype.itemsize
        write_companions(folder, self.folder, sizes)
        write_stacked(folder, self.stacked)
        if carried := [shard for shard in self.shards.values() if shard.carried]:
            names, total = [shard.carried for shard in carried], sum(shard.nbytes for shard in carried)
            write_carried_index(folder / CARRIED, names, total)

    def sides(self, target: Path) -> BothFormats:
        return BothFormats(hugging_face=self.folder, megatron=target, like=self.folder)

    def _parts(self, place: Place) -> Tensors:
        return place.entry.to_parts(tuple(self.source.read(name) for name in place.names))

    def _write_parameter(
        self, place: Place, parts: Tensors, file: BinaryIO
    ) -> list[tuple[str, Size, Size, int, int]]:
        written = []
        for region, part in zip(self.keys.regions(place), parts, strict=True):
            tensor = cast(part, self._dtype(place), region.key).reshape(region.shape)
            where = write_chunk(file, tensor)
            written.append((region.key, region.start, region.shape, *where))
        return written

    def _dtype(self, place: Place) -> torch.dtype:
        return self.tensors[self.keys.regions(place)[0].key][0]


def _tensors(keys: Keys, source: Source, dtype: torch.dtype | None) -> dict[str, tuple[torch.dtype, Size]]:
    """Dtype and shape of each tensor of the checkpoint. All layers and experts in one tensor must have the
    same dtype, unless `dtype` is given."""
    shapes: dict[str, Size] = {}
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for place in keys.table.places():
        if not place.entry.copy:
            for region in keys.regions(place):
                shapes[region.key] = region.whole
                dtypes[region.key] |= {source.dtype(name) for name in place.names}
    problems = [f"{key}: {_names(found)}" for key, found in dtypes.items() if not found <= set(WEIGHTS)]
    if problems and dtype is None:
        raise ConfigError(
            "Megatron keeps weights in float32, bfloat16 or float16, choose one (--dtype):\n  "
            + "\n  ".join(problems)
        )
    problems = [f"{key}: {_names(found)}" for key, found in dtypes.items() if len(found) > 1]
    if problems and dtype is None:
        raise ConfigError(
            "weights that Megatron keeps in one tensor have different dtypes, choose one (--dtype):\n  "
            + "\n  ".join(problems)
        )
    return {key: (dtype or next(iter(dtypes[key])), shape) for key, shape in shapes.items()}


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
