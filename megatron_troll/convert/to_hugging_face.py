"""Convert a Megatron checkpoint of any layout, of a run or converted earlier, to a Hugging Face folder."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_troll.config.load import load
from megatron_troll.convert.plan import (
    BothFormats,
    Options,
    TargetFile,
    ahead,
    cut_carried,
    cut_parameters,
    elements,
    identity_of,
    write_carried,
)
from megatron_troll.mcore.checkpoint_sums import SUMS, check_folder_sums
from megatron_troll.mcore.shape import read_shape
from megatron_troll.weights.checkpoint_source import checkpoint_of
from megatron_troll.weights.folder import CONFIG, file_name, left_out_of, write_companions, write_index
from megatron_troll.weights.original import original, slots
from megatron_troll.weights.table import Place, tensors_of
from megatron_troll.weights.tensor_file import TensorFileWriter
from megatron_troll.weights.values import cast


class ToHuggingFace:
    """Conversion to Hugging Face. Reads only the index of the source before `write`. `like` is a folder with
    config.json, tokenizer and carried tensors; keys that end in one of `left_out` are skipped.

    Raises FileNotFoundError or ValueError if the folder has no checkpoint of the model that config.json
    describes, listing every tensor that is missing, superfluous or wrongly shaped.
    """

    def __init__(self, folder: Path, like: Path, options: Options, left_out: tuple[str, ...] = ()) -> None:
        self.folder, self.like, self.options = folder, like, options
        self.source = checkpoint_of(folder, read_shape(like), left_out)
        begun = original(like, self.source.table)
        self.carried, self.slots = begun.carried, slots(self.source.table, begun.stacked)
        self.identity = identity_of("mcore2hf", options, [like / CONFIG, *self.source.files, *begun.files])
        if begun.remarks:
            self.identity["not_trained"] = begun.remarks
        self.remarks = [*left_out_of(like), *begun.remarks]
        if not (folder / SUMS).is_file():
            self.remarks.append(f"{folder} has no {SUMS}: its content was not checked")
        parameters = cut_parameters(self.source.table, self._dtype, options.shard_bytes, self.slots)
        shards = parameters + cut_carried(self.carried, options.shard_bytes)
        self.shards = {file_name(i, len(shards)): shard for i, shard in enumerate(shards)}

    def check(self, rank: int, size: int) -> None:
        names = [os.path.relpath(file, self.folder) for file in self.source.files]
        check_folder_sums(self.folder, names, rank, size)

    def write(self, shard: TargetFile, file: BinaryIO) -> Any:
        if shard.carried:
            return write_carried(self.carried, shard.carried, file)
        places = sorted(shard.places, key=lambda place: -self._dtype(place).itemsize)
        layout = {
            name: (self._dtype(place), shape) for place in places for name, shape in self._stored(place)
        }
        writer = TensorFileWriter(file, layout)
        read = ahead((place, self.source.parts(place)) for place in places)
        for name, tensor in tensors_of(read):
            if slot := self.slots.get(name):
                writer.write_piece(slot.name, cast(tensor, layout[slot.name][0], name))
            else:
                writer.write(name, cast(tensor, layout[name][0], name))
        return None

    def complete(self, folder: Path, records: dict[str, Any]) -> None:
        shards = self.shards.values()
        stored = [[name for place in shard.places for name, _ in self._stored(place)] for shard in shards]
        names = [[*dict.fromkeys(own), *shard.carried] for own, shard in zip(stored, shards, strict=True)]
        write_index(folder, names, sum(shard.nbytes for shard in shards))
        sizes: Counter[torch.dtype] = Counter()
        for place in (place for shard in shards for place in shard.places):
            sizes[self._dtype(place)] += elements(place) * self._dtype(place).itemsize
        write_companions(folder, self.like, sizes)

    def sides(self, target: Path) -> BothFormats:
        return BothFormats(hugging_face=target, megatron=self.folder, like=self.like)

    def _stored(self, place: Place) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of the tensors of the target that hold those of a parameter."""
        for name, tensor in zip(place.names, place.entry.hf, strict=True):
            slot = self.slots.get(name)
            yield (name, tensor.shape) if slot is None else (slot.name, slot.whole)

    def _dtype(self, place: Place) -> torch.dtype:
        return self.options.dtype or self.source.dtype_of(place)


def companions_of(folder: Path) -> Path:
    """Folder with config.json and tokenizer of a checkpoint: `folder`, or the one that its run began with.
    Raises FileNotFoundError if neither has a config.json."""
    if (folder / CONFIG).is_file():
        return folder
    wanted = "give --like, the folder with the model's config and tokenizer"
    run = folder.absolute().parent.parent / "config.yaml"
    if not run.is_file():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG} and is not one step of a run, runs/NAME/checkpoints/step_N: {wanted}"
        )
    began_with = Path(load(run).policy.path)
    if not (began_with / CONFIG).is_file():
        raise FileNotFoundError(
            f"{began_with}, which the run of {folder} began with, has no {CONFIG}: {wanted}"
        )
    return began_with
