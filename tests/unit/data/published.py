"""Rows in the shape of public sets, by the set's name in docs/data.md, and what they must be read as. The
texts are made up; no row of a set is copied."""

import base64
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
SOLUTION = r"Twice nine is \boxed{9}, no: \(\boxed{18}\)."
URL = "https://example.org/1"


@dataclass(frozen=True)
class Published:
    """Rows, the last turn of the first prompt and its answer; `kept`: how many rows are prompts."""

    rows: list[Row]
    asked: str
    answer: str
    kept: int = 1


def one(asked: str, gold: str, /, **row: Any) -> Published:
    return Published([row], asked, gold)


def verl(question: str, truth: str, ability: str, index: int, source: str) -> Row:
    return {
        "data_source": source,
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": question},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


def packed(tests: list[dict[str, str]]) -> str:
    """Private tests as code_generation_lite has them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def task(name: str, starter: str, public: list[Row], private: list[Row], function: str | None) -> Row:
    return {
        "question_title": name,
        "question_content": f"Do {name}.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": name,
        "contest_id": "c1",
        "contest_date": "2025-02-01T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(private),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def stdin(text: str, output: str) -> Row:
    return {"input": text, "output": output, "testtype": "stdin"}


def functional(text: str, output: str) -> Row:
    return {"input": text, "output": output, "testtype": "functional"}


STARTER = "class Solution:\n    def pairs(self, of: List[int], step: int) -> List[int]:\n        "
LIVE = [
    task("double", "", [stdin("2\n", "4\n")], [stdin("5\n", "10")], None),
    task("pairs", STARTER, [functional("[1, 2]\n3", "[4, 5]")], [functional("[]\n1", "[]")], "pairs"),
]
ARENA = {"problem_idx": 1, "problem": "how many?", "problem_type": ["Algebra", "Counting"]}
OLYMPIAD = {
    "id": 7,
    "question": "Find both roots.",
    "solution": ["They are 2 and 3."],
    "final_answer": ["2", "3"],
    "context": "Let p be a polynomial.",
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "subfield": "Algebra",
}
EURUS = [
    verl("how many?", "18", "math", 0, "numina_olympiads"),
    verl("write a program", '{"inputs": ["1"], "outputs": ["2"]}', "code", 1, "taco"),
]

SETS = {
    "GSM8K (openai/gsm8k)": one(
        "how many?", "1018", question="how many?", answer="2*509=<<2*509=1018>>1018\n#### 1,018"
    ),
    "MATH-500 (HuggingFaceH4)": one(
        "how many?",
        r"\frac{1}{2}",
        problem="how many?",
        solution=SOLUTION,
        answer=r"\frac{1}{2}",
        subject="Algebra",
        level=2,
        unique_id="test/algebra/1.json",
    ),
    "MATH (Hendrycks)": one(
        "how many?", "18", problem="how many?", level="Level 2", type="Algebra", solution=SOLUTION
    ),
    "AIME24 (HuggingFaceH4/aime_2024)": one(
        "how many?", "018", id=60, problem="how many?", solution="...", answer="018", url=URL, year="2024"
    ),
    "AIME24 (math-ai/aime24)": one("how many?", "18", id=60, problem="how many?", solution=SOLUTION, url=URL),
    "AIME24 (Maxwell-Jia/AIME_2024)": one(
        "how many?", "18", ID="2024-I-1", Problem="how many?", Solution="...", Answer=18
    ),
    "AIME25 (MathArena/aime_2025)": one("how many?", "18", **ARENA, answer=18),
    "AIME25 (opencompass/AIME2025)": one("how many?", "18", question="how many?", answer="18"),
    "AIME26 (MathArena/aime_2026)": one("how many?", "18", **ARENA, answer=18),
    "HMMT25 (MathArena/hmmt_feb_2025)": one("how many?", r"\sqrt{2}", **ARENA, answer=r"\sqrt{2}"),
    "AMC (AI-MO/aimo-validation-amc)": one(
        "how many?", "142", id=0, problem="how many?", answer=142.0, url=URL
    ),
    "AMC23 (math-ai/amc23)": one("how many?", "27.0", id=0, question="how many?", answer="27.0", url=URL),
    "Omni-MATH (KbsdJames)": one(
        "how many?",
        "$2^{k}$",
        domain=["Mathematics -> Algebra"],
        difficulty=8.0,
        problem="how many?",
        solution="...",
        answer="$2^{k}$",
        source="a contest",
    ),
    "OlympiadBench (Hothan)": Published([OLYMPIAD], "Let p be a polynomial.\n\nFind both roots.", "2, 3"),
    "Minerva (math-ai/minervamath)": one("how many?", "1e-3", question="how many?", answer="1e-3"),
    "Minerva (Qwen2.5-Math)": one(
        "how many?", "18", problem="how many?", type="Physics", solution=SOLUTION, idx=0
    ),
    "DeepScaleR (agentica-org)": one("how many?", "18", problem="how many?", answer="18", solution="..."),
    "DAPO-Math-17k (BytedTsinghua-SIA)": Published(
        [
            verl("how many?", "18", "MATH", 0, "math_dapo") | {"extra_info": {"index": "a-1"}},
            verl("how few?", "1", "MATH", 0, "math_dapo") | {"extra_info": {"index": "a-2"}},
        ],
        "how many?",
        "18",
        kept=2,
    ),
    "Eurus-2-RL (PRIME-RL), its mathematics": Published(EURUS, "how many?", "18"),
    "LiveCodeBench v6 (code_generation_lite)": Published(
        LIVE,
        "Do double.\n\nThe program reads its input from stdin and writes its output to stdout.",
        "",
        kept=2,
    ),
    "slime's (zhuzilin/dapo-math-17k)": one(
        "how many?", "18", prompt=[{"role": "user", "content": "how many?"}], label="18"
    ),
    "verl's, any": Published([verl("how many?", "18", "math", 3, "openai/gsm8k")], "how many?", "18"),
    "NeMo-RL's math rows": one("how many?", "18", problem="how many?", expected_answer="18"),
    "NeMo-RL's input and output": one("how many?", "18", input="how many?", output="18"),
    "NeMo-RL's chats": one(
        "how many?",
        "18",
        messages=[
            {"role": "user", "content": "how many?"},
            {"role": "assistant", "content": "18"},
        ],
        task_name="math",
    ),
}
