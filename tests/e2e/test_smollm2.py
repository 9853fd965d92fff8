"""A real model, SmolLM2-135M-Instruct, and its vocabulary of 49,152 tokens: made from its GGUF file,
generated with, and trained for two steps on three ranks that hold a third of the vocabulary each."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.observe.rollouts import read_step
from tests.e2e.exported import largest_gap
from tests.e2e.workplace import REPOSITORY, Workplace, succeed
from tests.smollm2 import folder

IDS = REPOSITORY / "tests" / "unit" / "convert" / "recorded" / "smollm2_ids.json"
TOKENS = 40
ASKED = (
    *("Write a short story about a lighthouse.", "Explain why the sky is blue."),
    *("Name three uses of copper.", "What is a prime number?", "Describe Paris in winter."),
    *("Write a Python function that reverses a string.", "How do bees find flowers?"),
    "List the months, one a line.",
)
GREEDY = f"""
name: greedy
models: {{policy: {{path: model, dtype: fp32}}}}
eval:
  open:
    files: [prompts.jsonl]
    sampling: {{max_tokens: {TOKENS}, temperature: 0}}
"""
# Two steps of the recipe on three ranks, with little of everything.
SHORT = (
    *("train", str(REPOSITORY / "examples" / "configs" / "lm_troll.yaml"), "name=short"),
    *("models.policy.path=model", "models.policy.layout={tp: 3}", "launch.ranks=3"),
    *("rollout.prompts=4", "rollout.samples=4", "rollout.sampling.max_tokens=24"),
    "data.sources.names.reward={name: 'tests.e2e.rewards:Checksum'}",
    *("train.steps=2", "evaluation.prompts=4", "data.sources.names.gym.size=64", "data.held_out=16"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("smollm2"))
    (place.root / "model").symlink_to(folder())
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "none"} for text in ASKED]
    (place.root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place.root / "greedy.yaml").write_text(GREEDY)
    return place


def test_every_text_has_the_ids_that_llama_cpp_gives_it(place: Workplace) -> None:
    tokenizer = load_tokenizer(place.root / "model")
    for text, ids in json.loads(IDS.read_text())["cases"]:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text


def test_the_likeliest_answers_are_those_of_transformers(place: Workplace) -> None:
    succeed(place.mtroll("eval", "greedy.yaml"))
    model = AutoModelForCausalLM.from_pretrained(place.root / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place.root / "model")
    answers = list(read_step(place.run("greedy"), 1))
    assert len(answers) == len(ASKED)
    assert max(len(answer.tokens) for answer in answers) == TOKENS
    for answer in answers:
        turn = [{"role": "user", "content": answer.question.removeprefix("user: ")}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0]
        own = ids[prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(own, skip_special_tokens=True) == answer.text


def test_two_steps_with_a_third_of_the_vocabulary_on_each_rank(place: Workplace) -> None:
    succeed(place.mtroll(*SHORT))
    drawn = place.run("short") / "rollouts" / "step_000001.0-of-1.jsonl.gz"
    assert largest_gap(place.root / "model", drawn) < 1e-4
    rows = place.metrics("short")[1:]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        # 64 of 49,152 tokens: on open text a support leaves mass out.
        assert 0.5 < row["covered_old"] < 1 - 1e-4
        assert row["k_bound_old"] > 0
        assert row["grad_norm"] > 0
