"""Short hashes of what a run is made with: prompts, files, and the source of user code."""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from megatron_troll.types import Prompt

# A larger file is hashed by its size and by so many blocks, spread evenly over it.
WHOLE_BYTES = 64 * 2**20
BLOCKS, BLOCK_BYTES = 256, 64 * 2**10
# Folders of installed packages.
INSTALLED = ("site-packages", "dist-packages")


def short(parts: Iterable[bytes]) -> str:
    """16 hex digits of the hash of `parts`, each with its length."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """The hash of prompts in their order: ids, chats, answers and records."""
    return short(_prompt(prompt) for prompt in prompts)


def _prompt(prompt: Prompt) -> bytes:
    # A Parquet record may hold dates or bytes.
    return json.dumps(
        [prompt.id, prompt.text_key, prompt.answer, prompt.record], sort_keys=True, default=repr
    ).encode()


def of_texts(prompts: Sequence[Prompt]) -> np.ndarray:
    """uint64 [P], a hash of the chat of each prompt."""
    return np.array([int(prompt.text_key[:16], 16) for prompt in prompts], dtype=np.uint64)


def of_file(path: Path) -> str:
    """The hash of a file's content; of a file above WHOLE_BYTES, its size and BLOCKS blocks of it. Raises
    OSError."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        return short(_blocks(file, size))


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    yield str(size).encode()
    if size <= WHOLE_BYTES:
        file.seek(0)
        while block := file.read(2**20):
            yield block
        return
    for i in range(BLOCKS):
        file.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
        yield file.read(BLOCK_BYTES)


def of_files(files: Mapping[str, str]) -> str:
    """The hash of several files, from the hash of each by its name."""
    return short(f"{name}:{files[name]}".encode() for name in sorted(files))


def sources(root: Path, module: str, own: Iterable[str] = ()) -> dict[str, Path]:
    """The Python files of `module` (dotted) and of whatever it imports, directly or not, that lies under
    `root` too; by their paths relative to it. `own`: top-level packages that are left out. Where packages are
    installed, the others there are not the module's own: only its package counts. Nothing is imported; a file
    that is not Python ends the search there."""
    left_out, found, waiting = set(own), {}, [module]
    package = module.split(".")[0] if root.name in INSTALLED else None
    while waiting:
        name = waiting.pop()
        file, top = _file_of(root, name), name.split(".")[0]
        if file is None or top in left_out or top != (package or top) or str(file.relative_to(root)) in found:
            continue
        found[str(file.relative_to(root))] = file
        waiting += _imported(file, name)
    return found


def _file_of(root: Path, name: str) -> Path | None:
    path = root.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _imported(file: Path, name: str) -> list[str]:
    """Names that the module `name` imports; some may be no modules but what they define."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    names = [".".join(package[: i + 1]) for i in range(len(package))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [found for found in names if found]
