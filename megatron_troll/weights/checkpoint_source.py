"""The weights of a model in a Megatron checkpoint, read as Hugging Face tensors."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_folder import (
    BACKENDS,
    MANIFEST,
    TENSORS,
    is_checkpoint,
    refuse_newer,
    verified,
)
from megatron_troll.mcore.shape import ModelShape, described
from megatron_troll.weights.families import table_of
from megatron_troll.weights.megatron_keys import Keys, Region
from megatron_troll.weights.table import Place, Table, Tensors
from megatron_troll.weights.torch_dist import SavedTensors, TensorsError

POLICY = "policy"
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
OWN_LAYER = re.compile(r"decoder\.layers\.\d+\.")


class CheckpointSource:
    """One model of a checkpoint of any layout, whose keys begin with `prefix`. Optimizer states and keys that
    end in one of `left_out` are ignored. Reads one parameter at a time and keeps the last one, because the
    next tensor may come from it too.

    Raises TensorsError listing every missing, unused and wrongly shaped tensor.
    """

    def __init__(
        self, tensors: SavedTensors, table: Table, prefix: str = "", left_out: tuple[str, ...] = ()
    ) -> None:
        self.table = table
        self._tensors = tensors
        names = [key.removeprefix(prefix) for key in tensors.tensors if key.startswith(prefix)]
        self._names = {name for name in names if not (OPTIMIZER.match(name) or name.endswith(left_out))}
        self._keys = Keys(table, not any(OWN_LAYER.match(name) for name in self._names), prefix)
        self._check()
        self._places = {
            name: place for place in table.places() if not place.entry.copy for name in place.names
        }
        self._last: tuple[Place | None, Tensors] = (None, ())

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self._tensors.files

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.table.tensors().items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.dtype_of(self._places[name])

    def dtype_of(self, place: Place) -> torch.dtype:
        return self._tensors.tensors[self._regions(place)[0].key].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        place = self._places[name]
        if self._last[0] != place:
            self._last = (place, place.entry.from_parts(self.parts(place)))
        tensor = self._last[1][place.names.index(name)]
        return tensor if index is None else tensor[index]

    def parts(self, place: Place) -> Tensors:
        """Read the full parts of a parameter."""
        return tuple(
            self._tensors.read(region).view(shape)
            for region, shape in zip(self._regions(place), place.entry.part_shapes, strict=True)
        )

    def _regions(self, place: Place) -> tuple[Region, ...]:
        """The regions in which the checkpoint holds a parameter, or should hold it."""
        found = [regions for regions in self._keys.candidates(place) if self._has(regions)]
        return found[0] if found else self._keys.regions(place)

    def _has(self, regions: tuple[Region, ...]) -> bool:
        return all(region.key in self._tensors.tensors for region in regions)

    def _check(self) -> None:
        problems: dict[str, None] = {}
        used = set()
        for place in self.table.places():
            regions = self._regions(place)
            used |= {region.key.removeprefix(self._keys.prefix) for region in regions}
            if not (place.entry.copy and not self._has(regions)):
                problems |= dict.fromkeys(self._problems(place, regions))
        problems |= {
            f"unused: {name} {self._tensors.tensors[self._keys.prefix + name].shape}": None
            for name in sorted(self._names - used)
        }
        if problems:
            raise TensorsError(
                f"{self._tensors.folder} does not hold the model that config.json describes:\n  "
                + "\n  ".join(problems)
            )

    def _problems(self, place: Place, regions: tuple[Region, ...]) -> Iterator[str]:
        for region in regions:
            saved = self._tensors.tensors.get(region.key)
            if saved is None:
                yield f"missing: {region.key} {region.whole}"
            elif not _fits(saved.shape, region.whole, place.entry.axis if place.entry.padded else None):
                yield f"wrong shape: {region.key} {saved.shape}, the config says {region.whole}"


def _fits(there: tuple[int, ...], wanted: tuple[int, ...], padded: int | None) -> bool:
    """Whether the shapes are equal, or `there` is longer by padding along axis `padded`."""
    if padded is None or len(there) != len(wanted):
        return there == wanted
    return there[padded] >= wanted[padded] and all(
        a == b for axis, (a, b) in enumerate(zip(there, wanted)) if axis != padded
    )


def checkpoint_of(folder: Path, shape: ModelShape, left_out: tuple[str, ...] = ()) -> CheckpointSource:
    """The policy in a checkpoint of a run, or the model in a folder that `mtroll convert hf2mcore` or another
    program on Megatron-Core wrote. See CheckpointSource for `left_out`.

    Raises FileNotFoundError or ValueError if there is no such model or it has another shape; CheckpointError
    if the checkpoint of a run is damaged or was written by a newer Megatron-Core.
    """
    place = folder / TENSORS if is_checkpoint(folder) else folder
    if not (place / BACKENDS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no Megatron checkpoint ({BACKENDS}): give one step of a run, "
            "runs/NAME/checkpoints/step_N, or a folder that `mtroll convert hf2mcore` wrote"
        )
    if (folder / MANIFEST).is_file():
        _check_run(folder, shape)
        return CheckpointSource(SavedTensors(place), table_of(shape), f"{POLICY}.", left_out)
    return CheckpointSource(SavedTensors(place), table_of(shape), "", left_out)


def _check_run(folder: Path, shape: ModelShape) -> None:
    manifest = verified(folder)
    refuse_newer(folder, manifest)
    saved, wanted = manifest["models"][POLICY]["shape"], described(shape)
    differing = [
        f"{key} {saved.get(key)} there, {wanted.get(key)} here"
        for key in {**wanted, **saved}
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise ConfigError(f"{folder} holds another model than config.json describes: {', '.join(differing)}")
