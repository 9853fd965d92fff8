"""What several unit tests start from.

Triton kernels run here in Triton's interpreter, on CPU tensors: forward, backward and values are tested,
speed and anything that only a GPU compiler does are not. It has to be asked for before anything imports
triton, as megatron.core does.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

os.environ["TRITON_INTERPRET"] = "1"

from megatron_troll.data.demo_model import write_base
from tests.printable import printable_tokenizer
from tests.unit.gym import run_here

# The same examples every time, however slow the machine is.
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes tasks of reasoning-gym runs in this process."""
    monkeypatch.setattr("megatron_troll.data.gym.tasks.subprocess.run", run_here)


@pytest.fixture(scope="session")
def printable() -> PreTrainedTokenizerFast:
    """A tokenizer that knows every printable character."""
    return printable_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder
