"""Record the token ids that llama.cpp gives texts, for tests of the tokenizers of GGUF files.

    pip install xllamacpp && python tools/record_llama_cpp.py FILE.gguf OUT.json

The texts are digits, blanks, line ends, code, other scripts, and special tokens, mixed at random (always the
same ones).
"""

import argparse
import json
import random
from importlib.metadata import version
from pathlib import Path

import httpx
import xllamacpp  # pyright: ignore[reportMissingImports]

# Cut at "|".
DIGITS = "0|7|42|1234|3.14159|-5|1e-7|10,000|\u0663|\u00bd|x2"
BLANKS = " |  |   |\t|\n|\n\n|\r\n| \n|\n |\n    |\u00a0"
WORDS = "the| answer|Hello|don't|WE'LL|naïve|straße|中文|日本|Привет|\U0001f642|e\u0301"
SIGNS = "+|=| = |(|)|[|]|{|}|;|...|->|==|#|\\frac{1}{2}|$|_|`"
CODE = "def f(x):\n    return x + 1\n|for i in range(10):\n|\tif (a[0] != 2) {\n|SELECT * FROM t;"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|im_start|>user\n", "<|im_end|>\n", "<|endoftext|>")
PIECES = (
    *(piece for pieces in (DIGITS, BLANKS, WORDS, SIGNS, CODE) for piece in pieces.split("|")),
    *SPECIAL,
)
FIXED = (
    *("", "\n\n1", "=  5", "\n    7", "1. one\n2. two\n\n10. ten"),
    *("a\n\n\n1", "12 34  56   78", "The answer is 42."),
)
COUNT = 400


def texts() -> list[str]:
    chance = random.Random(0)
    mixed = ("".join(chance.choices(PIECES, k=chance.randint(1, 12))) for _ in range(COUNT))
    return sorted({*FIXED, *PIECES, *mixed})


def ids_of(path: Path, asked: list[str]) -> list[list[int]]:
    """The ids that llama.cpp gives each text, with the tokenizer of a GGUF file."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(path), 512, False
    server = xllamacpp.Server(params)
    found = []
    for text in asked:
        body = {"content": text, "add_special": False, "parse_special": True}
        answer = httpx.post(f"{server.listening_address}/tokenize", json=body, trust_env=False)
        found.append(answer.raise_for_status().json()["tokens"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    cases = list(zip(texts(), ids_of(arguments.file, texts()), strict=True))
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"file": arguments.file.name, "xllamacpp": version("xllamacpp")})
    arguments.out.write_text(f'{head[:-1]}, "cases": [\n{lines}\n]}}\n')
    print(f"{len(cases)} texts")


if __name__ == "__main__":
    main()
