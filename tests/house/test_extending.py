"""The examples of docs/extending.md work: they are run as a reader would, from files of their own."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_troll import rollout
from megatron_troll.config import Config
from megatron_troll.data.chat import tokenized
from megatron_troll.data.demo_model import VOCAB_SIZE, write_base
from megatron_troll.data.stops import stop_tokens
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.mcore.shape import read_shape
from megatron_troll.objectives.compose import compose
from megatron_troll.objectives.slots import Policy
from megatron_troll.rewards.score import Scorer
from megatron_troll.rollout.engine import Setup, requests_for
from megatron_troll.types import Message, Prompt, Rollout
from megatron_troll.weights.table import parameters_of
from tests.dist.parameters import unshard
from tests.house.markdown import ROOT, blocks, configurations

PAGE = ROOT / "docs" / "extending.md"
PROMPT = Prompt("sort-31", (Message("user", "sort 31"),), "13")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The page's Python blocks as importable files, named by their first line. Gives their names."""
    names = []
    for text in blocks(PAGE, "python"):
        file = tmp_path / text.splitlines()[0].removeprefix("# ")
        file.write_text(text)
        names.append(file.stem)
    monkeypatch.syspath_prepend(tmp_path)
    yield names
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def configs(tmp_path: Path, modules: list[str]) -> dict[str, Config]:
    """The page's configurations, by the module of it that they name."""
    assert modules == ["my_rewards", "my_methods", "my_engines", "my_family"]
    return dict(zip(modules, configurations(PAGE, tmp_path)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    write_base(folder)
    return folder


def answered(config: Config, base: Path) -> list[Rollout]:
    """Two rollouts of the page's engine."""
    tokenizer = load_tokenizer(base)
    template = ChatTemplate(tokenizer)
    stops = stop_tokens(template, base, VOCAB_SIZE).ids
    engine = rollout.build(Setup(config, None, base, tokenizer, stops))  # pyright: ignore[reportArgumentType]
    return engine.generate(requests_for(tokenized([PROMPT], template), 2), config.rollout.sampling, 1)


def test_the_engine_answers(configs: dict[str, Config], base: Path) -> None:
    rollouts = answered(configs["my_engines"], base)
    assert [one.text for one in rollouts] == ["13", "13"]
    assert len(rollouts[0].response_ids) == len(rollouts[0].logp) == 3


def test_the_reward_scores_in_a_worker(configs: dict[str, Config], base: Path) -> None:
    right, *_ = answered(configs["my_engines"], base)
    with Scorer(configs["my_rewards"].reward) as scorer:
        assert scorer.score([right]).reward.tolist() == [1.0]
    assert configs["my_rewards"].reward.fields["length_penalty"] == 0.1


def test_the_methods_take_their_slots(configs: dict[str, Config]) -> None:
    objective = compose(configs["my_methods"].objective)
    rewards, group = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 1])
    assert objective.advantage(rewards, group).tolist() == [0.5, -0.5, 0.0]
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    penalty = objective.kl.penalty(None, Policy(new, old, torch.zeros(2)), None).value  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(penalty, 0.05 * torch.tensor([0.0, torch.e**-1]))


def test_the_table_counts_and_shards(modules: list[str], base: Path) -> None:
    shape = read_shape(base)
    table = importlib.import_module("my_family").table(shape)
    layer = shape.hidden + 2 * shape.ffn * shape.hidden
    assert parameters_of(table) == VOCAB_SIZE * shape.hidden + shape.layers * layer
    gated = table.entries[2]
    tensors = tuple(torch.randn(tensor.shape) for tensor in gated.hf)
    shards = [gated.shard(tensors, rank, 2) for rank in range(2)]
    for before, after in zip(tensors, unshard(gated, shards)):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
