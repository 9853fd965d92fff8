import pytest

from megatron_troll.data.demonstrations import load_demonstrations
from megatron_troll.data.rows import DataError

ASK = {"role": "user", "content": "sort 21"}
ANSWER = {"role": "assistant", "content": "12"}


def test_assistant_turns_carry_loss_unless_they_say_otherwise(write_jsonl):
    chat = [ASK, ANSWER | {"train": False}, ASK, ANSWER]
    (demonstration,) = load_demonstrations([write_jsonl("a.jsonl", {"messages": chat})])
    assert [message.train for message in demonstration.messages] == [False, False, False, True]


def test_repeated_demonstrations_all_count(write_jsonl):
    record = {"messages": [ASK, ANSWER]}
    assert len(load_demonstrations([write_jsonl("a.jsonl", record, record)])) == 2


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not valid JSON"),
        ({"text": "a"}, "'messages' must be a list"),
        ({"messages": [ASK]}, "no assistant turn that carries loss"),
        ({"messages": [ASK | {"train": True}, ANSWER]}, "only assistant turns may carry loss"),
        ({"messages": [ASK, ANSWER | {"train": "yes"}]}, r"messages\[1\].train must be true or false"),
    ],
)
def test_a_malformed_demonstration_is_named_by_its_line(write_jsonl, record, said):
    path = write_jsonl("a.jsonl", {"messages": [ASK, ANSWER]}, record)
    with pytest.raises(DataError, match=f"line 2: .*{said}"):
        load_demonstrations([path])


def test_a_chat_that_the_template_cannot_encode_is_named_by_its_line(write_jsonl, tokenizer):
    (demonstration,) = load_demonstrations([write_jsonl("a.jsonl", {"messages": [ANSWER]})])
    with pytest.raises(DataError, match=r"a\.jsonl line 1: turn 1 carries loss"):
        demonstration.encode(tokenizer)
