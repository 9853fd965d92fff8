"""From `rollout.engine` to an engine: a file's name, or an import path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_troll import rollout
from megatron_troll.config import Config, ConfigError, Model, Models, RolloutConfig, Sampling, SGLang
from megatron_troll.rollout.engine import Engine, Request, Setup
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.types import Rollout

HERE = "tests.unit.rollout.test_build"


class Recorder(Engine):
    """An engine outside the package."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        return []


class NotAnEngine:
    pass


def test_inprocess_is_found_by_its_name() -> None:
    assert rollout.find("inprocess") is InProcessEngine


def test_an_engine_outside_the_package_is_built_by_its_import_path() -> None:
    config = Config(
        name="run",
        models=Models(policy=Model(path="nowhere")),
        rollout=RolloutConfig(engine=f"{HERE}:Recorder"),
    )
    model: Any = object()
    tokenizer: Any = object()
    setup = Setup(config, model, Path("nowhere"), tokenizer, (3, 5))
    engine = rollout.build(setup)
    assert isinstance(engine, Recorder)
    assert engine.setup is setup
    assert engine.sync(3) == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inproces", r"rollout\.engine: unknown method 'inproces'.*inprocess"),
        (f"{HERE}:NotAnEngine", "does not lead to a subclass of Engine"),
        (f"{HERE}:Missing", "does not lead to a subclass of Engine"),
        ("no_such_package:Engine", r"rollout\.engine: cannot import 'no_such_package'"),
    ],
)
def test_an_unknown_engine_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rollout.find(name)


def test_context_parallelism_is_refused_for_inprocess_only() -> None:
    with pytest.raises(ConfigError, match=r"models\.policy\.layout\.cp=1 \(it is 2\)"):
        rollout.check(RolloutConfig(), cp=2)
    rollout.check(RolloutConfig(), cp=1)
    rollout.check(RolloutConfig(engine=f"{HERE}:Recorder"), cp=2)


# No request can have these.
UNUSABLE = ("", "http://[::1", "http://host:70000", "http://host\x00:1")


@pytest.mark.parametrize(
    "url", [*("127.0.0.1:30000", "ftp://host:1", "http://", "http://host:1/v1"), *UNUSABLE]
)
def test_what_is_no_servers_url_is_refused(url: str) -> None:
    for named in (SGLang(servers=(url,)), SGLang(router=url)):
        with pytest.raises(ConfigError, match="is not the URL of a server, such as"):
            rollout.check(RolloutConfig(engine="sglang", sglang=named), cp=1)
    rollout.check(RolloutConfig(engine="sglang", sglang=SGLang(servers=("http://[::1]:1",))), cp=2)


def test_an_unknown_engine_is_refused_by_the_check() -> None:
    with pytest.raises(ConfigError, match="unknown method 'sglan'"):
        rollout.check(RolloutConfig(engine="sglan"), cp=1)


def test_servers_without_memory_cannot_draw_while_the_trainer_trains() -> None:
    together = RolloutConfig(engine="sglang", staleness=1, sglang=SGLang(colocated=True))
    with pytest.raises(ConfigError, match=r"rollout\.staleness=1 generates while the trainer trains"):
        rollout.check(together, cp=1)


def test_an_engine_that_draws_at_once_has_the_batch_when_it_is_started() -> None:
    setup: Any = object()
    engine = Recorder(setup)
    assert not engine.generates_elsewhere
    assert engine.start([], Sampling(), round=1)() == []
    engine.rest()
    engine.forget(1)
