"""Record the token ids that llama.cpp gives texts with each pre-tokenizer that GGUF files are read with.

    pip install xllamacpp && python tools/record_pre_tokenizers.py OUT.json

The vocabulary is small and made here: merges are learnt across words, so that every cut of a pre-tokenizer
shows in the ids. One token is made by no merge: only a pre-tokenizer that takes whole words first finds it.
"""

import argparse
import json
import re
import tempfile
import unicodedata
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from record_llama_cpp import SPECIAL, ids_of, texts
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from megatron_troll.convert.gguf.tokenizer import PRE_TOKENIZERS

VOCABULARY, HIDDEN, EVERY = 500, 32, 3
WHOLE_WORD = "Zürich"


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id, and merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    special = [text for text in SPECIAL if text.endswith("|>")]
    tokenizer.train_from_iterator([piece for text in texts() for piece in cut(text, special)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    ((word, _),) = bytes_of.pre_tokenize_str(WHOLE_WORD)
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [*ordered, word, *special], [*map(" ".join, model["merges"])]


def cut(text: str, special: list[str]) -> list[str]:
    """The pieces of a text between special tokens."""
    return re.split("|".join(map(re.escape, special)), text)


def write(path: Path, pre: str, tokens: list[str], merges: list[str]) -> None:
    """Write a GGUF file of a tiny model with this tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"llama.{key}", 1)
    for key in ("embedding_length", "feed_forward_length", "context_length", "rope.dimension_count"):
        writer.add_uint32(f"llama.{key}", HIDDEN)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [kind_of(token) for token in tokens])
    writer.add_array("tokenizer.ggml.merges", merges)
    writer.add_uint32("tokenizer.ggml.eos_token_id", len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    shapes |= {f"blk.0.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (HIDDEN, HIDDEN) for name in square}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kind_of(token: str) -> int:
    return int(gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokens, merges = vocabulary()
    # Qwen's tokenizers compose characters, and llama.cpp does not: the texts are composed.
    composed = (unicodedata.normalize("NFC", text) for text in texts()[::EVERY])
    asked = sorted({*composed, f"{WHOLE_WORD} {WHOLE_WORD}"})
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder) / f"{pre}.gguf"
            write(path, pre, tokens, merges)
            ids[pre] = ids_of(path, asked)
    head = {"xllamacpp": version("xllamacpp"), "tokens": tokens, "merges": merges}
    lines = ",\n".join(
        json.dumps([text, *(found[number] for found in ids.values())]) for number, text in enumerate(asked)
    )
    start = json.dumps(head | {"columns": list(ids)}, ensure_ascii=False)
    arguments.out.write_text(f'{start[:-1]}, "cases": [\n{lines}\n]}}\n')
    print(f"{len(asked)} texts with {len(ids)} pre-tokenizers")


if __name__ == "__main__":
    main()
