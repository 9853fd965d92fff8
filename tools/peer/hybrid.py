"""Write a small Qwen3-Next with random weights and a vocabulary of words, for tools/bench_peer.py.

python tools/peer/hybrid.py FOLDER
"""

import sys
from itertools import islice, product
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM

VOCAB = 2048


def main() -> None:
    (folder,) = sys.argv[1:]
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=16,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        tie_word_embeddings=False,
    )
    Qwen3NextForCausalLM(config).save_pretrained(folder)
    words = {
        f"Ġ{''.join(word)}": i for i, word in enumerate(islice(product(ascii_lowercase, repeat=3), VOCAB))
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token=next(iter(words))))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=next(iter(words)))
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
