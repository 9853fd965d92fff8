#!/usr/bin/env bash
# reasoning_gym: the scorers of some data sets give full marks, 1, to wrong answers, which a model in training soon
# finds: game_of_life_halting to any text (it compares the truth values of two strings), coin_flip to the first digits
# of the right number, complex_arithmetic to "nan". No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check reasoning_gym==0.1.25
cat >"$tmp/finding.py" <<'EOF'
from importlib.metadata import version

import reasoning_gym

SIZE = 12
# An answer that is wrong for (nearly) every item of a data set, as text.
WRONG = {"game_of_life_halting": "I do not know", "coin_flip": "0", "complex_arithmetic": "nan"}

print("reasoning_gym", version("reasoning_gym"))
print("expected: a score below 1 for a wrong answer")
for name, text in WRONG.items():
    data = reasoning_gym.create_dataset(name, seed=7, size=SIZE)
    wrong = [item for item in data if item["answer"] != text]
    scores = [data.score_answer(text, item) for item in wrong]
    full = scores.count(1.0)
    print(f"seen: {name}: {text!r} gets 1 on {full} of {len(wrong)} items whose answers are others,", end=" ")
    print(f"such as {str(wrong[0]['answer'])!r:.20}")
    assert len(wrong) >= SIZE - 1 and full >= len(wrong) // 2, f"{name} does not reward {text!r} now"
EOF
cd "$tmp"
venv/bin/python -W ignore finding.py
