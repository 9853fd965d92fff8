"""The weights of a Hugging Face folder, read one tensor at a time by name."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.weights.quantised import refuse_quantised
from megatron_troll.weights.tensor_file import Stored, TensorFileError, read_header, read_tensor
from megatron_troll.weights.values import check_values

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def holds_weights(folder: Path) -> bool:
    """Whether a folder has safetensors under the names that Hugging Face gives them."""
    return any((folder / name).is_file() for name in (INDEX, SINGLE))


class FolderSource:
    """The safetensors files of a Hugging Face folder; one tensor at a time is read into memory, and its
    values are checked. Pickled checkpoints are never opened. `quantised` also takes quantised weights, which
    are refused otherwise.

    Raises FileNotFoundError if there are no safetensors files, or if the folder lacks files that the index
    lists; ConfigError if files are not safetensors or are cut short, lack tensors that the index lists, or
    are quantised. Errors name every such file or tensor; of quantised weights one.
    """

    def __init__(self, folder: str | Path, *, quantised: bool = False) -> None:
        self.folder = Path(folder)
        self._opened: tuple[str, BinaryIO | None] = ("", None)
        self._stored = self._scan()
        if not quantised:
            refuse_quantised(self.folder, self.stored)
        self._shapes = {name: stored.shape for name, (_, stored) in self._stored.items()}

    @property
    def stored(self) -> dict[str, Stored]:
        """Dtype and shape of every tensor."""
        return {name: stored for name, (_, stored) in self._stored.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [self.folder / file for file in self._listed()]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name][1].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        file, stored = self._stored[name]
        try:
            tensor = read_tensor(self._open(file).fileno(), stored, index)
        except OSError as error:
            raise OSError(f"{name} cannot be read from {self.folder / file}: {error}") from error
        check_values(tensor, name, self.folder / file)
        return tensor

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._stored[name][0]

    def _open(self, file: str) -> BinaryIO:
        """Open a file and keep it open: most reads follow a read of the same file."""
        name, opened = self._opened
        if opened is None or name != file:
            opened = open(self.folder / file, "rb", buffering=0)  # noqa: SIM115 - closed when it is replaced
            self._opened = (file, opened)
        return opened

    def _scan(self) -> dict[str, tuple[str, Stored]]:
        stored: dict[str, tuple[str, Stored]] = {}
        broken = []
        for file in self._listed():
            try:
                header = read_header(self.folder / file)
            except TensorFileError as error:
                broken.append(str(error))
                continue
            # If two files hold a tensor, the index decides.
            stored |= {
                name: (file, tensor) for name, tensor in header.items() if self._index.get(name, file) == file
            }
        if broken:
            raise ConfigError("\n".join(broken))
        if absent := sorted(set(self._index) - set(stored)):
            raise ConfigError(
                f"{self.folder / INDEX} lists tensors that their files lack; download the folder again:\n  "
                + "\n  ".join(absent)
            )
        return stored

    def _listed(self) -> list[str]:
        files = sorted(set(self._index.values())) or [SINGLE]
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent and not self._index:
            raise FileNotFoundError(self._without_weights())
        if absent:
            raise FileNotFoundError(
                f"{self.folder / INDEX} lists files that are missing: {', '.join(absent)}"
            )
        if files != [SINGLE] and (self.folder / SINGLE).is_file():
            raise ConfigError(
                f"{self.folder} has both {SINGLE} and {INDEX}, which lists other files: Hugging Face reads "
                "the first, SGLang all; remove the one that does not hold the model"
            )
        return files

    def _without_weights(self) -> str:
        shards = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if shards:
            more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
            return (
                f"{INDEX} is missing in {self.folder}, which has {', '.join(shards[:3])}{more}: download the "
                "index too, which says what each of these files holds"
            )
        return (
            f"no {INDEX} or {SINGLE} in {self.folder}: weights are read from safetensors only (convert "
            "other formats first), or use init=random"
        )

    @cached_property
    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            found = _files_by_tensor(json.loads(path.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); download it again") from error
        for file in set(found.values()):
            if Path(file).is_absolute() or ".." in Path(file).parts or not file.isprintable():
                raise ConfigError(
                    f"{path} lists {file!a}, which is not a file in its folder; download it again"
                )
        return found


def _files_by_tensor(index: Any) -> dict[str, str]:
    match index:
        case {"weight_map": dict(files)} if files and all(type(file) is str for file in files.values()):
            return files
    raise ValueError("it has no weight_map from tensors to files")
