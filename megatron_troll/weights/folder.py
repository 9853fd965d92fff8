"""Write a Hugging Face model folder aside, then rename it: a kill leaves the old one or the new one."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.system import flush
from megatron_troll.weights.folder_source import INDEX
from megatron_troll.weights.quantised import quantisation_of, without_settings
from megatron_troll.weights.tensor_file import TensorFileWriter

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")
COMPANIONS = (
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Of a vision tower.
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")


def check_target(folder: Path, source_folder: Path) -> None:
    """Raise ConfigError unless a model from `source_folder` can be exported to `folder`, which must be
    missing, be empty, or hold an earlier export."""
    if not (source_folder / CONFIG).is_file():
        raise ConfigError(
            f"{source_folder / CONFIG} not found: the export takes config, tokenizer and all that is not "
            "trained from there"
        )
    if folder.resolve() == source_folder.resolve():
        raise ConfigError(f"{folder} is the folder the model came from: export to another one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise ConfigError(f"{folder} holds something that is not an exported model: export to another folder")


class FolderWriter:
    """Collects tensors on the host into safetensors files of at most `max_bytes` (one tensor at least)
    under a temporary name; leaving the context without an error puts the folder in place. `ends`: token ids
    that end a sequence, for its generation_config.json."""

    def __init__(self, folder: Path, source_folder: Path, max_bytes: int, ends: Sequence[int] = ()) -> None:
        self.ends = ends
        self.folder, self.source_folder, self.max_bytes = folder, source_folder, max_bytes
        self.part = folder.with_name(f".{folder.name}.part")
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._files: list[tuple[str, ...]] = []
        self._dtypes: dict[torch.dtype, int] = {}

    def __enter__(self) -> "FolderWriter":
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish()
        else:
            shutil.rmtree(self.part)

    def add(self, name: str, tensor: Tensor, *, trained: bool = True) -> None:
        """Copy `tensor` to the host; before that, write the pending file if it would become too large. The
        config names the dtype of the `trained` ones."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self._write_pending()
        self._pending[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        if trained:
            self._dtypes[tensor.dtype] = self._dtypes.get(tensor.dtype, 0) + tensor.nbytes

    def _write_pending(self) -> None:
        pending = sorted(self._pending.items(), key=lambda item: -item[1].itemsize)
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in pending}
        with open(self.part / str(len(self._files)), "wb") as file:
            writer = TensorFileWriter(file, layout)
            for name, tensor in pending:
                writer.write(name, tensor)
        self._files.append(tuple(layout))
        self._pending, self._pending_bytes = {}, 0

    def _finish(self) -> None:
        self._write_pending()
        for i in range(len(self._files)):
            (self.part / str(i)).rename(self.part / file_name(i, len(self._files)))
        write_index(self.part, self._files, self._total_bytes)
        write_companions(self.part, self.source_folder, self._dtypes)
        write_ends(self.part, self.ends)
        for path in (*self.part.iterdir(), self.part):
            flush(path)
        self._put_in_place()

    def _put_in_place(self) -> None:
        old = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self.part.rename(self.folder)
        flush(self.folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def file_name(i: int, count: int) -> str:
    """Name of the i-th of `count` files, counted from 0."""
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: Sequence[Sequence[str]], total_bytes: int) -> None:
    """Write the index; `files[i]` names the tensors in the i-th file."""
    weight_map = {name: file_name(i, len(files)) for i, names in enumerate(files) for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def left_out_of(source_folder: Path) -> list[str]:
    """Remarks on the keys that `write_companions` leaves out of the files of `source_folder`."""
    said = quantisation_of(source_folder)
    return [f"config.json is without its quantisation ({said}): the weights are plain"] if said else []


def write_companions(folder: Path, source_folder: Path, dtypes: Mapping[torch.dtype, int]) -> None:
    """Copy tokenizer, preprocessors and config of `source_folder`. The config names the dtype that has most
    of the bytes, and settings of quantisation are left out: the weights have none. If it says so already, it
    is the same file."""
    read = json.loads((source_folder / CONFIG).read_text())
    dtype = str(max(dtypes, key=lambda dtype: dtypes[dtype])).removeprefix("torch.")
    config = _of_dtype(without_settings(read), dtype)
    if config == read:
        shutil.copyfile(source_folder / CONFIG, folder / CONFIG)
    else:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for name in (*COMPANIONS, *PREPROCESSORS):
        if (source_folder / name).is_file():
            shutil.copyfile(source_folder / name, folder / name)


def _of_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` with `dtype` where it names one, for the whole or for its text; for the whole if nowhere."""
    text = config.get("text_config")
    named: dict[str, Any] = {key: dtype for key in DTYPE_KEYS if key in config}
    if isinstance(text, dict) and any(key in text for key in DTYPE_KEYS):
        named["text_config"] = text | {key: dtype for key in DTYPE_KEYS if key in text}
    return config | (named or {DTYPE_KEYS[0]: dtype})


def write_ends(folder: Path, ends: Sequence[int]) -> None:
    """Name the token ids `ends`, if any, as the ends of sequence in the folder's generation_config.json."""
    if not ends:
        return
    path = folder / GENERATION_CONFIG
    config = json.loads(path.read_text()) if path.is_file() else {}
    config["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    path.write_text(json.dumps(config, indent=2) + "\n")
