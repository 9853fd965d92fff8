"""Which samples a rollout batch asks for."""

import pytest

from megatron_troll.data.chat import tokenized
from megatron_troll.data.demo_model import character_tokenizer
from megatron_troll.data.template import ChatTemplate
from megatron_troll.rollout.engine import requests_for
from megatron_troll.types import Message, Prompt


def prompt(name: str) -> Prompt:
    made = Prompt(name, (Message("user", f"sort {name}"),), answer="")
    return tokenized([made], ChatTemplate(character_tokenizer()))[0]


def test_a_prompt_that_comes_again_draws_other_samples() -> None:
    """Draws are keyed by prompt and sample; a group is still one place of the batch."""
    requests = requests_for([prompt("31"), prompt("72"), prompt("31")], 2)
    asked = [(request.prompt.id, request.group, request.sample) for request in requests]
    assert asked == [("31", 0, 0), ("31", 0, 1), ("72", 1, 0), ("72", 1, 1), ("31", 2, 2), ("31", 2, 3)]
    assert requests[0].prompt_ids.tolist() == requests[4].prompt_ids.tolist()


def test_a_prompt_that_was_not_tokenized_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 'p' has no ids"):
        requests_for([Prompt("p", (), "")], 1)
