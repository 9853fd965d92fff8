from megatron_troll.config.node import ConfigError, nearest
from megatron_troll.config.tree import Config
from megatron_troll.config.validate import read_fields

__all__ = ["Config", "ConfigError", "nearest", "read_fields"]
