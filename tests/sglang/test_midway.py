"""New weights while answers are under way: each token says which weights drew it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.client import NamedRequest
from megatron_troll.rollout.sglang.control import Pause
from tests.sglang.asking import VERSIONS, Parts
from tests.sglang.farm import RealServer
from tests.sglang.serving import asking, give, question

LONG, SHORT = 160, 8


@pytest.fixture(scope="module")
def references(folder: Path, trained: Path) -> dict[int, torch.nn.Module]:
    """Hugging Face's model with each version of the weights."""
    return {
        version: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        for version, path in ((1, folder), (2, trained))
    }


@pytest.mark.parametrize(("mode", "requests"), [("retract", 1), ("abort", 2)])
def test_the_rest_of_an_answer_is_drawn_from_new_weights(
    mode: Pause,
    requests: int,
    one: RealServer,
    folder: Path,
    trained: Path,
    references: dict[int, torch.nn.Module],
) -> None:
    """A server keeps what it has and goes on by itself (retract), or hands it over to be asked for the rest
    (abort)."""
    give([one], folder)
    asked_for = [*(question(i, LONG) for i in range(3)), question(3, SHORT)]

    async def update(parts: Parts) -> None:
        while 3 not in parts.asked.answers:  # by then the others have about as many tokens
            await asyncio.sleep(0.001)
        await parts.servers.want(None)
        await parts.control.pause(one.url, mode)
        await parts.control.load(one.url, str(trained), VERSIONS.called(2))
        await parts.control.resume(one.url)
        await parts.servers.want(VERSIONS.called(2))

    asked = asking([one]).generate(asked_for, update)
    assert asked.times == dict.fromkeys(range(4), 1)
    assert len(asked.sent) == 3 * requests + 1
    assert set(asked.answers[3].versions.tolist()) == {1}
    for i in range(3):
        answer = asked.answers[i]
        assert len(answer.ids) == LONG
        old = int((answer.versions == 1).sum())
        assert SHORT // 2 < old < LONG
        assert answer.versions.tolist() == [1] * old + [2] * (LONG - old)
        assert_drawn_from(references, asked_for[i], answer)


def assert_drawn_from(
    references: dict[int, torch.nn.Module], question: NamedRequest, answer: Completion
) -> None:
    """The law of each token is that of its version, whatever drew the tokens before it."""
    prompt = len(question.ask.ids)
    tokens = torch.tensor([[*question.ask.ids, *answer.ids.tolist()]])
    with torch.no_grad():
        laws = {v: model(tokens).logits[0].log_softmax(-1).numpy() for v, model in references.items()}
    at = prompt - 1 + np.arange(len(answer.ids))
    for version, law in laws.items():
        drawn = answer.versions == version
        expected = law[at, answer.ids]
        np.testing.assert_allclose(answer.logp[drawn], expected[drawn], atol=1e-4)
    assert np.abs(laws[1] - laws[2]).max() > 1e-2
