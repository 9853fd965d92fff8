"""Exported models as transformers loads them."""

import gzip
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def largest_gap(folder: Path, rollouts: Path) -> float:
    """How far the log-probs of stored rollouts (4 decimals) lie from those of the model in `folder`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Tokens are stored as texts; several of a byte-level vocabulary have the same one, and no id.
    texts = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    ids = {text: i for i, text in enumerate(texts)}
    same = {text for text, count in Counter(texts).items() if count > 1} | {""}
    with gzip.open(rollouts, "rt") as file:
        samples = [json.loads(line) for line in file]
    # A token that the tokenizer lacks (the vocabulary is padded) was stored as an empty text.
    clear = [sample for sample in samples if same.isdisjoint(sample["tokens"])]
    gaps = [_gap(model, tokenizer, sample, [ids[text] for text in sample["tokens"]]) for sample in clear]
    assert gaps
    return max(gaps)


@torch.no_grad()
def _gap(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sample: dict, response: list[int]
) -> float:
    question = {"role": "user", "content": sample["question"].removeprefix("user: ")}
    text = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*prompt, *response]])
    law = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    logp = law.gather(1, torch.tensor(response)[:, None])[:, 0]
    return float((logp - torch.tensor(sample["logp"])).abs().max())
