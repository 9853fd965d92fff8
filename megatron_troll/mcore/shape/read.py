"""Read the shape of a model from its Hugging Face config.json."""

import json
from pathlib import Path
from typing import Any

from megatron_troll.config import ConfigError
from megatron_troll.mcore.shape.families import READERS
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape


def read_shape(folder: str | Path) -> ModelShape:
    """Read the shape from `folder`/config.json.

    Raises FileNotFoundError if the file is missing, ConfigError naming the key if one is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {folder} is not a Hugging Face model folder")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: it holds no keys, but {str(config)[:40]!a}")
    return shape_of(config, str(path))


def shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that the content of a config.json describes. Raises ConfigError naming `where` and the key
    that is missing, malformed or not supported."""
    family = config.get("model_type")
    reader = READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        raise ConfigError(f"{where}: model_type {family!r} is not supported ({', '.join(READERS)})")
    return reader(Fields(config, where))
