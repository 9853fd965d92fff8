"""Rollout engines, and how tokens are sampled."""

from megatron_troll.config import Config, ConfigError, RolloutConfig, SGLang, find_class, known_methods
from megatron_troll.rollout.engine import Engine, Setup

ENGINES = "megatron_troll.rollout.engines"


def check(config: RolloutConfig, cp: int) -> None:
    """Like `check_engine`; also raises ConfigError for server URLs, API keys or modes that cannot be used."""
    check_engine(config, cp)
    if config.engine == "sglang":
        _check_sglang(config.sglang)
        if config.sglang.colocated and config.staleness:
            raise ConfigError(
                f"rollout.staleness={config.staleness} generates while the trainer trains, and "
                "rollout.sglang.colocated servers have no memory then: set only one of the two"
            )


def check_engine(config: RolloutConfig, cp: int) -> None:
    """Raises ConfigError for an unknown engine, or one that cannot generate on `cp` context-parallel ranks.
    A known engine is not imported; no file is read."""
    if config.engine not in known_methods(ENGINES):
        find(config.engine)
    if config.engine == "inprocess" and cp > 1:
        raise ConfigError(
            f"rollout.engine: inprocess does not generate under context parallelism: set "
            f"models.policy.layout.cp=1 (it is {cp})"
        )


def _check_sglang(config: SGLang) -> None:
    from megatron_troll.rollout.sglang.http import is_server, read_key

    if config.api_key_file is not None:
        read_key(config.api_key_file)
    for key, url in [("servers", url) for url in config.servers] + [("router", config.router)]:
        if url is not None and not is_server(url):
            raise ConfigError(
                f"rollout.sglang.{key}: {url!r} is not the URL of a server, such as http://127.0.0.1:30000"
            )


def returns_experts(config: Config) -> bool:
    """Whether the engine can return the experts it chose. A known engine is not imported."""
    name = config.rollout.engine
    if name == "sglang":
        return config.serve.routed_experts
    return name == "inprocess" or find(name).returns_experts


def build(setup: Setup) -> Engine:
    """Build the engine that `setup.rollout` names. Blocks on all ranks. Raises ConfigError, and EngineError
    if something that the engine needs is missing."""
    return find(setup.rollout.engine)(setup)


def find(name: str) -> type[Engine]:
    """The class that `rollout.engine` names: from a file in engines/, or `package.module:Class`. Raises
    ConfigError for an unknown one."""
    return find_class(name, ENGINES, Engine, "rollout.engine")
