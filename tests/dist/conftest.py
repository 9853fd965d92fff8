"""Ranks for distributed tests, started once per session and world size."""

from collections.abc import Iterator

import pytest

from tests.dist.harness import RankPool


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool
