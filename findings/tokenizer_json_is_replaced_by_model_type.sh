#!/usr/bin/env bash
# transformers: tokenizer.json holds a whole tokenizer, and tokenizer_config.json names the class that takes it as it
# is. Where config.json, the model's file, says model_type qwen2, AutoTokenizer takes Qwen2Tokenizer all the same, which
# keeps the vocabulary and the merges and puts Qwen's normalizer, pre-tokenizer and decoder in the place of the file's.
# A model of this architecture with a tokenizer of its own gets other ids and other texts, without a message. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cat >"$tmp/finding.py" <<'EOF'
import json
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "a 12"
folder = Path("model")
folder.mkdir()
# Words are cut before blanks, which are written as ▁ (as SentencePiece does).
vocab = {"▁": 0, "a": 1, "1": 2, "2": 3, "12": 4, "▁a": 5}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("▁", "a")]))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
tokenizer.decoder = decoders.Metaspace()
tokenizer.save(str(folder / "tokenizer.json"))
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def read(model):
    """The class, the tokens of TEXT, and the text of these tokens, in a folder with a model of this type."""
    (folder / "config.json").write_text(json.dumps({"model_type": model}))
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded(TEXT)["input_ids"]
    return type(loaded).__name__, loaded.convert_ids_to_tokens(ids), loaded.decode(ids)


written = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT)
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
print(f"expected of {TEXT!r}:", (written.tokens, tokenizer.decode(written.ids)))
seen = {model: read(model) for model in ("llama", "qwen3", "qwen2")}
for model, found in seen.items():
    print(f"seen with model_type {model}:", found)
assert seen["llama"][1:] == seen["qwen3"][1:] == (written.tokens, TEXT)
assert seen["qwen2"][0] == "Qwen2Tokenizer"
assert seen["qwen2"][1] != written.tokens and seen["qwen2"][2] != TEXT, "the file is read as it is now"
EOF
cd "$tmp"
venv/bin/python -W ignore finding.py
