"""Measure how long a run takes to read its prompts, on rows in the format of DAPO-Math:

python tools/bench_prompts.py TOKENIZER_FOLDER [--rows 179000]
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_troll.config import Data
from megatron_troll.data.prompts import load_prompts
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import load_tokenizer

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
WORDS = re.findall(
    r"\S+",
    "let the triangle with sides of length be inscribed in a circle whose radius is find number positive "
    "integers such that sum equals product for every real function satisfying equation and remainder when "
    r"divided by probability exactly points on line polynomial degree coefficients $x^2$ $\frac{a}{b}$ $ABC$",
)


def row(index: int, draw: random.Random) -> dict:
    """One record in the columns of DAPO-Math-17k, with a problem of 20 to 120 words and numbers."""
    words = [
        draw.choice(WORDS) if draw.random() < 0.85 else str(draw.randrange(10_000))
        for _ in range(draw.randrange(20, 120))
    ]
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"{BEFORE}{' '.join(words)} ({index})?{AFTER}"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(draw.randrange(1000)), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{draw.getrandbits(128):032x}"},
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tokenizer")
    arguments.add_argument("--rows", type=int, default=179_000)
    asked = arguments.parse_args()
    draw = random.Random(0)
    template = ChatTemplate(load_tokenizer(asked.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dapo.parquet"
        pq.write_table(pa.Table.from_pylist([row(index, draw) for index in range(asked.rows)]), file)
        data = Data(files=(str(file),), held_out=1024, max_prompt_tokens=4096)
        wall, cpu = time.perf_counter(), time.process_time()
        prompts = load_prompts(data, 0, template)
        took = {"rows": asked.rows, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    sys.stdout.write(json.dumps(took | {"train": len(prompts.train)}) + "\n")


if __name__ == "__main__":
    main()
