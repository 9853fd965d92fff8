"""Servers that a run must not draw from: each is refused in words that say what to do."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.mcore.shape import read_shape
from megatron_troll.rollout.sglang.http import EngineError, Http, WrongServer
from megatron_troll.rollout.sglang.identity import Identity
from tests.sglang.farm import Farm, RealServer
from tests.sglang.model import VOCAB, write_model
from tests.sglang.recordings import PROMPT
from tests.sglang.serving import give


@pytest.fixture(scope="module")
def others(
    farm: Farm, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RealServer]]:
    """Servers that each differ from the policy in one thing."""
    root = tmp_path_factory.mktemp("others")
    folders = {
        "family": write_model(root / "family", model_type="qwen3"),
        "layers": write_model(root / "layers", num_hidden_layers=2),
        "experts": write_model(root / "experts", moe_intermediate_size=20),
        "vocabulary": write_model(root / "vocabulary", vocab_size=VOCAB + 16),
        "tokenizer": with_other_tokenizer(folder, root / "tokenizer"),
    }
    started = {name: farm.start(path) for name, path in folders.items()}
    yield {name: server.wait_until_healthy() for name, server in started.items()}
    for server in started.values():
        server.kill()


def with_other_tokenizer(folder: Path, target: Path) -> Path:
    """A copy of the model whose tokenizer has two characters' ids the other way round."""
    shutil.copytree(folder, target)
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    file.write_text(json.dumps(content))
    return target


def check(server: RealServer, policy: Path, temperature: float = 0.7) -> str:
    tokenizer = load_tokenizer(policy)
    identity = Identity(policy, read_shape(policy), tokenizer, "add 12 and 21", PROMPT, temperature)

    async def run() -> str:
        http = Http(None)
        try:
            return await identity.check(http, server.url)
        finally:
            await http.close()

    return asyncio.run(run())


WORDS: dict[str, tuple[type[EngineError], str]] = {
    "family": (WrongServer, r"of type 'qwen3', the run samples from a 'qwen3_moe'"),
    "layers": (WrongServer, r"layers 2, not 4: start the server from .*/served"),
    "experts": (WrongServer, "expert_ffn 20, not 24: start the server from .*/served"),
    "vocabulary": (WrongServer, f"vocabulary of {VOCAB + 16}, the run's model has {VOCAB}"),
    "tokenizer": (WrongServer, r"another tokenizer: 'add 12 and 21' is \[.*\] there"),
}


@pytest.mark.parametrize("name", WORDS)
def test_another(name: str, others: dict[str, RealServer], folder: Path) -> None:
    kind, words = WORDS[name]
    with pytest.raises(kind, match=words):
        check(others[name], folder)


def test_another_that_took_the_policys_weights(others: dict[str, RealServer], folder: Path) -> None:
    """SGLang on CPU pads experts, so that weights of another size fit."""
    give([others["experts"]], folder)
    with pytest.raises(WrongServer, match="expert_ffn 20, not 24"):
        check(others["experts"], folder)


def test_the_policys_own(one: RealServer, folder: Path) -> None:
    assert check(one, folder)
