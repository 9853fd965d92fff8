"""The demo task: what its files hold, and that Hugging Face reads its model folder."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_troll.config import Data, WarmStart
from megatron_troll.data.demo import write_demo
from megatron_troll.data.demonstrations import load_demonstrations
from megatron_troll.data.prompts import load_prompts
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import check_vocab, load_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    return folder


def bytes_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_sizes_and_the_answers(demo):
    tokenizer = load_tokenizer(demo / "base")
    data = Data(files=(str(demo / "data/train.jsonl"),), held_out=(str(demo / "data/held_out.jsonl"),))
    prompts = load_prompts(data, 0, ChatTemplate(tokenizer))
    assert (len(prompts.train), len(prompts.held_out)) == (8000, 1024)
    for prompt in (*prompts.train, *prompts.held_out):
        word, digits = prompt.messages[0].content.split()
        assert (word, len(digits), prompt.answer) == ("sort", 5, "".join(sorted(digits)))


def test_no_held_out_answer_occurs_in_training(demo):
    held_out = {record["answer"] for record in lines(demo / "data/held_out.jsonl")}
    train = {record["answer"] for record in lines(demo / "data/train.jsonl")}
    warm = {"".join(sorted(r["messages"][0]["content"][5:])) for r in lines(demo / "data/warm.jsonl")}
    assert len(held_out) > 100
    assert not held_out & (train | warm)


def test_demonstrations_show_the_habit_and_nothing_else(demo):
    demonstrations = lines(demo / "data/warm.jsonl")
    assert len(demonstrations) == 8000
    right = 0
    for record in demonstrations:
        digits, shown = (turn["content"] for turn in record["messages"])
        answer = "".join(sorted(digits[5:]))
        assert shown in (answer, answer[:-2] + answer[-1] + answer[-2])
        right += shown == answer
    assert 0.38 < right / 8000 < 0.48


def test_the_same_seed_writes_the_same_bytes(demo, tmp_path):
    write_demo(tmp_path, seed=0)
    write_demo(tmp_path, seed=0)
    assert bytes_of(tmp_path) == bytes_of(demo)
    write_demo(tmp_path, seed=1)
    assert (tmp_path / "data/train.jsonl").read_bytes() != (demo / "data/train.jsonl").read_bytes()


def test_a_demonstration_is_six_tokens_of_loss(demo):
    tokenizer = load_tokenizer(demo / "base")
    config = WarmStart(files=(str(demo / "data/warm.jsonl"),))
    example = load_demonstrations(config, ChatTemplate(tokenizer), 256).examples[0]
    trained = example.response_ids[example.mask > 0].tolist()
    assert tokenizer.decode(trained) == example.prompt.messages[-1].content + "<|end|>"
    assert len(trained) == 6


def test_decoding_gives_the_text_back(demo):
    tokenizer = load_tokenizer(demo / "base")
    text = "solve 3x+4=(10): a.b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (len(ids), tokenizer.decode(ids)) == (len(text), text)


def test_hugging_face_builds_the_model(demo):
    config = AutoConfig.from_pretrained(demo / "base")
    check_vocab(load_tokenizer(demo / "base"), config.vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 453_312
