#!/usr/bin/env bash
# transformers: a GGUF file names by a word (tokenizer.ggml.pre) the rule that cuts a text before merges. AutoTokenizer
# knows some of these words; for any other, SmolLM's included, it takes GPT-2's rule without a message, and so gives
# other ids than llama.cpp for line ends and blanks before digits. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.3.5 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cat >"$tmp/finding.py" <<'EOF'
import sys
import warnings
from importlib.metadata import version

import gguf
from transformers import AutoTokenizer

warnings.simplefilter("ignore")
# Ċ stands for a line end in byte-level tokenizers.
TOKENS = ["<end>", "1", "Ċ", "ĊĊ", "a"]


def tokens_of(rule):
    """The tokens of two line ends and a digit, by a file that differs from the others in one word."""
    writer = gguf.GGUFWriter(f"{rule}.gguf", "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8, "vocab_size": 5, "attention.head_count": 1}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", rule)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1, 1, 1])
    writer.add_array("tokenizer.ggml.merges", ["Ċ Ċ"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=f"{rule}.gguf")
    return tokenizer.tokenize("\n\n1")


print("transformers", version("transformers"), "gguf", version("gguf"), "python", sys.version.split()[0])
seen = {rule: tokens_of(rule) for rule in ("gpt-2", "smollm", "no-such-rule")}
print("expected: smollm cuts digits off first: ['ĊĊ', '1']; an error or a warning for no-such-rule")
print("seen:    ", seen)
assert seen["gpt-2"] == ["Ċ", "Ċ", "1"]
assert seen["smollm"] == seen["no-such-rule"] == seen["gpt-2"], "transformers reads the rule of the file now"
EOF
cd "$tmp"
venv/bin/python finding.py
