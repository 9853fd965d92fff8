"""Real servers, shared by the tests of this folder: each test gives them the weights that it needs, and
leaves them healthy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.conftest import ranks2  # noqa: F401  (a fixture)
from tests.sglang.farm import Farm, RealServer
from tests.sglang.model import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that servers start from."""
    return write_model(tmp_path_factory.mktemp("models") / "served")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights: what a trainer has."""
    return write_model(tmp_path_factory.mktemp("models") / "trained", seed=1)


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("servers")) as farm:
        yield farm


@pytest.fixture(scope="session")
def two(farm: Farm, folder: Path) -> list[RealServer]:
    """Servers that no test kills."""
    return [server.wait_until_healthy() for server in [farm.start(folder), farm.start(folder)]]


@pytest.fixture(scope="session")
def one(two: list[RealServer]) -> RealServer:
    return two[0]
