"""The configuration of a command: a YAML file, or a run folder that is opened again, wherever it lies now."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import load, read
from megatron_troll.observe.run_folder import RunFolder

# The last key that a run writes into its config.yaml.
LAST = next(reversed(Config.model_fields))


def load_opened(given: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, or of the run folder `given` (its config.yaml names it too).

    A run stays in the folder that is opened: if that was renamed, copied, or is opened from another working
    directory, `runs` and `name` say where it lies now, unless `overrides` do. Raises ConfigError.
    """
    path = Path(given)
    file = RunFolder(path).config if path.is_dir() else path
    return load(file, [*_place(file), *overrides])


def _place(file: Path) -> list[str]:
    """Overrides for a run folder that lies elsewhere than its config.yaml says; [] for any other file."""
    folder = RunFolder(file.parent)
    if file.name != folder.config.name or not file.is_file() or not folder.was_opened():
        return []
    root = folder.root if folder.root.name not in ("", "..") else folder.root.resolve()
    said = read(file).plain()
    if LAST not in said or not file.read_bytes().endswith(b"\n"):
        raise ConfigError(
            f"{file}: it is cut short, and should hold the configuration of its run: restore it"
        )
    before = Path(str(said.get("runs", "runs"))) / str(said.get("name", ""))
    if before.resolve() == root.resolve():
        return []
    return [f"runs={json.dumps(str(root.parent))}", f"name={json.dumps(root.name)}"]
