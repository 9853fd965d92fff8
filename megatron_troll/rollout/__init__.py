"""Who generates, and how a token is drawn."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from megatron_troll.config.methods import find_class
from megatron_troll.config.tree import RolloutConfig
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.rollout.engine import Engine


def build(
    config: RolloutConfig,
    model: MegatronModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    seed: int,
) -> Engine:
    """The engine that `config` names, made by calling its class with these arguments. Raises ConfigError."""
    return find(config.engine)(config, model, tokenizer, tuple(stop_ids), seed)


def find(name: str) -> Callable[..., Engine]:
    """The class that `rollout.engine` names: that of a file in engines/, or of `package.module:Class`. Raises
    ConfigError for an unknown one."""
    return find_class(name, "megatron_troll.rollout.engines", Engine, "rollout.engine")
