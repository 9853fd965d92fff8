#!/usr/bin/env bash
# reasoning_gym: some data sets draw from, or search in, Python sets whose order follows the hashes of strings, which
# differ from process to process unless PYTHONHASHSEED is set. With one seed, two ranks, or a run and its continuation,
# have other questions, or other reference answers to the same questions. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check reasoning_gym==0.1.25
cat >"$tmp/items.py" <<'EOF'
import json
import sys

import reasoning_gym

made = {}
for name in sys.argv[1:]:
    items = reasoning_gym.create_dataset(name, seed=1, size=20)
    made[name] = [[item["question"], item["answer"]] for item in items]
json.dump(made, sys.stdout)
EOF
cat >"$tmp/finding.py" <<'EOF'
import json
import os
import subprocess
import sys
from importlib.metadata import version

OTHER_QUESTIONS = ["isomorphic_strings", "polynomial_multiplication", "ransom_note"]
OTHER_ANSWERS = ["knight_swap", "word_ladder"]
NAMES = ["basic_arithmetic", *OTHER_QUESTIONS, *OTHER_ANSWERS]


def items(hash_seed):
    """The first 20 items of each data set with seed 1, as a fresh process makes them."""
    command = [sys.executable, "-W", "ignore", "items.py", *NAMES]
    made = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": hash_seed}, stdout=subprocess.PIPE, check=True)
    return json.loads(made.stdout)


def equal(part, one, other):
    return sum(a[part] == b[part] for a, b in zip(one, other, strict=True))


print("reasoning_gym", version("reasoning_gym"), "python", sys.version.split()[0])
first, again, second = items("1"), items("1"), items("2")
print("20 items of seed 1, from two processes that differ in PYTHONHASHSEED, which Python draws where it is not set")
print("expected: 20 questions and 20 answers are equal, as with basic_arithmetic")
seen = {name: [equal(part, first[name], second[name]) for part in (0, 1)] for name in NAMES}
for name, (questions, answers) in seen.items():
    print(f"seen: {name:25} {questions:2} questions, {answers:2} answers")
assert first == again, "they depend on more than the hash seed"
assert seen["basic_arithmetic"] == [20, 20]
assert all(seen[name][0] < 10 for name in OTHER_QUESTIONS)
assert all(seen[name][0] == 20 and seen[name][1] < 20 for name in OTHER_ANSWERS)
EOF
cd "$tmp"
venv/bin/python finding.py
