"""The tokenizer of a GGUF file.

A file names its pre-tokenizer, which cuts a text before merges, by a word (tokenizer.ggml.pre): what the
word means is in no file. Transformers (5.23) uses GPT-2's for every word, which gives other ids for blanks
and line ends before digits.
"""

from collections.abc import Mapping
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_troll.config import ConfigError
from megatron_troll.convert.gguf.metadata import GGUFFile

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cut(letters: str, numbers: str) -> pre_tokenizers.PreTokenizer:
    """Words with the character before them, numbers, punctuation with the blank before it, blanks."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
    punctuation = rf" ?[^\s{letters}\p{{N}}]+[\r\n]*"
    pattern = "|".join((CONTRACTIONS, word, numbers, punctuation, BLANKS))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# By tokenizer.ggml.pre.
PRE_TOKENIZERS: Mapping[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": _gpt2(),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": _cut(r"\p{L}", r"\p{N}{1,3}"),
    "qwen2": _cut(r"\p{L}", r"\p{N}"),
    "deepseek-r1-qwen": _cut(r"\p{L}", r"\p{N}"),
}
# Whose whole words are tokens even where merges lead elsewhere.
WORDS_FIRST = ("llama-bpe",)
COMPOSED = ("qwen2", "deepseek-r1-qwen")
NAMED = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template. Raises ConfigError if one of its kind is not known."""
    if (model := file["tokenizer.ggml.model"]) != "gpt2":
        raise ConfigError(f"{file.path}: tokenizer.ggml.model {model!r} is not supported (gpt2)")
    pre = file["tokenizer.ggml.pre"]
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not known ({', '.join(PRE_TOKENIZERS)}): another "
            "pre-tokenizer would give other token ids"
        )
    tokens, kinds = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, _merges(file, vocabulary), ignore_merges=pre in WORDS_FIRST))
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(file, tokens)
    added = [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=file[".context_length"],
        clean_up_tokenization_spaces=False,
        **_named(file, tokens),
        chat_template=file.get("tokenizer.chat_template"),
    )


def _merges(file: GGUFFile, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise ConfigError(f"{file.path}: tokenizer.ggml.merges: {' '.join(merge)!a} makes no token")
    return merges


def _named(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    """Tokens of a role, such as eos_token."""
    ids = {ours: file.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in NAMED.items()}
    for role, number in ids.items():
        if number is not None and number >= len(tokens):
            raise ConfigError(f"{file.path}: token {number} ({role}) is beyond the {len(tokens)} tokens")
    return {f"{role}_token": tokens[number] for role, number in ids.items() if number is not None}


def _post_processor(file: GGUFFile, tokens: list[str]) -> Any:
    bytes_of = processors.ByteLevel(trim_offsets=False)
    if not file.get("tokenizer.ggml.add_bos_token", False):
        return bytes_of
    number = file["tokenizer.ggml.bos_token_id"]
    if number >= len(tokens):
        raise ConfigError(f"{file.path}: token {number} (bos) is beyond the {len(tokens)} tokens")
    first = processors.TemplateProcessing(
        single=f"{tokens[number]} $A",
        pair=f"{tokens[number]} $A {tokens[number]} $B",
        special_tokens=[(tokens[number], number)],
    )
    return processors.Sequence([bytes_of, first])
