#!/usr/bin/env bash
# transformers: a Qwen3.5 config.json has tie_word_embeddings twice, beside text_config and in it. The whole model reads
# the first, its text model the second. Qwen3_5Config(tie_word_embeddings=True, ...) sets only the first; the saved
# folder holds no head, since it is tied, and the text model, which AutoModelForCausalLM takes of this folder, gets
# random weights as its head. The load report calls them newly initialised; it is no error. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.23.0
cat >"$tmp/finding.py" <<'EOF'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"],
}
VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
    "num_position_embeddings": 16,
}
ids = torch.arange(8)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


config = Qwen3_5Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
torch.manual_seed(0)
Qwen3_5ForConditionalGeneration(config).save_pretrained("model")
saved = json.loads(Path("model/config.json").read_text())
both = saved["tie_word_embeddings"], saved["text_config"]["tie_word_embeddings"]
whole = Qwen3_5ForConditionalGeneration.from_pretrained("model")
text = [AutoModelForCausalLM.from_pretrained("model") for _ in range(2)]
apart = [float((logits(model) - logits(whole)).abs().max()) for model in text]
between = float((logits(text[0]) - logits(text[1])).abs().max())

print("torch", version("torch"), "transformers", version("transformers"))
print("the folder says tie_word_embeddings", both[0], "and, in text_config,", both[1])
print("expected: both classes give a text the same logits, and so does a second load")
print(f"seen: {type(whole).__name__} and {type(text[0]).__name__} are up to {apart[0]:.2g} apart,", end=" ")
print(f"two loads of the latter {between:.2g}")
assert both == (True, False)
assert type(text[0]).__name__ == "Qwen3_5ForCausalLM"
embedding = whole.model.language_model.embed_tokens.weight
assert all(torch.equal(model.model.embed_tokens.weight, embedding) for model in text)
assert min(*apart, between) > 1e-3, "the text model has the tied head now"
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 venv/bin/python -W ignore finding.py
