"""Exported models as transformers loads them."""

import gzip
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def largest_gap(folder: Path, rollouts: Path) -> float:
    """How far the log-probs of stored rollouts (4 decimals) lie from those of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with gzip.open(rollouts, "rt") as file:
        samples = [json.loads(line) for line in file]
    # A token that the tokenizer lacks (the vocabulary is padded) was stored as an empty text.
    gaps = [_gap(model, tokenizer, sample) for sample in samples if "" not in sample["tokens"]]
    assert gaps
    return max(gaps)


@torch.no_grad()
def _gap(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sample: dict) -> float:
    question = {"role": "user", "content": sample["question"].removeprefix("user: ")}
    text = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    response = [tokenizer.convert_tokens_to_ids(token) for token in sample["tokens"]]
    ids = torch.tensor([[*prompt, *response]])
    law = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    logp = law.gather(1, torch.tensor(response)[:, None])[:, 0]
    return float((logp - torch.tensor(sample["logp"])).abs().max())
