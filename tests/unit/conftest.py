"""What several unit tests start from.

Triton kernels run here in Triton's interpreter, on CPU tensors: forward, backward and values are tested,
speed and anything that only a GPU compiler does are not. It has to be asked for before anything imports
triton, as megatron.core does.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["TRITON_INTERPRET"] = "1"

from megatron_troll.data.demo_model import write_base

# The same examples every time, however slow the machine is.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder
