import pytest

from megatron_troll.config import WarmStart
from megatron_troll.data.demonstrations import Demonstrations, load_demonstrations
from megatron_troll.data.rows import DataError
from megatron_troll.data.template import ChatTemplate

ASK = {"role": "user", "content": "sort 21"}
ANSWER = {"role": "assistant", "content": "12"}


@pytest.fixture
def load(tokenizer, write_jsonl):
    """Read records (or raw lines) as the demonstrations of one file."""

    def read(*records, longest: int = 256) -> Demonstrations:
        config = WarmStart(files=(write_jsonl("a.jsonl", *records),))
        return load_demonstrations(config, ChatTemplate(tokenizer), longest)

    return read


def test_assistant_turns_carry_loss_unless_they_say_otherwise(load):
    chat = [ASK, ANSWER | {"train": False}, ASK, ANSWER]
    (example,) = load({"messages": chat}).examples
    assert [message.train for message in example.prompt.messages] == [False, False, False, True]
    assert example.mask.tolist() == [0.0] * 22 + [1.0] * 3


def test_repeated_demonstrations_all_count(load):
    record = {"messages": [ASK, ANSWER]}
    assert str(load(record, record)) == "2 demonstrations"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not valid JSON"),
        ({"text": "a"}, "'messages' must be a list"),
        ({"messages": [ANSWER]}, "turn 1 carries loss"),
        ({"messages": [ASK]}, "no assistant turn that carries loss"),
        ({"messages": [ASK | {"train": True}, ANSWER]}, "only assistant turns may carry loss"),
        ({"messages": [ASK, ANSWER | {"train": "yes"}]}, r"messages\[1\].train must be true or false"),
    ],
)
def test_a_malformed_demonstration_is_named_by_its_line(load, record, said):
    with pytest.raises(DataError, match=f"line 2: .*{said}.* \\(sft.malformed=skip skips and counts it"):
        load({"messages": [ASK, ANSWER]}, record)


def test_a_demonstration_longer_than_the_model_is_refused(load):
    with pytest.raises(DataError, match=r"a\.jsonl line 1: 13 tokens, more than the model's .* 12"):
        load({"messages": [ASK, ANSWER]}, longest=12)


def test_without_a_usable_demonstration_there_is_nothing_to_learn(tokenizer, write_jsonl):
    config = WarmStart(files=(write_jsonl("a.jsonl", "{"),), malformed="skip")
    with pytest.raises(DataError, match="no usable demonstration; 0 demonstrations, 1 malformed skipped"):
        load_demonstrations(config, ChatTemplate(tokenizer), 256)
