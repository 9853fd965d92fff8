"""What several unit tests start from."""

from pathlib import Path

import pytest

from megatron_troll.data.demo_model import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder
