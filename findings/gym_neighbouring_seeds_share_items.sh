#!/usr/bin/env bash
# reasoning_gym: item i of a data set is made from its seed plus i, so data sets with neighbouring seeds share all but
# one of their items. A held-out set with the next seed consists of training items, and ReseedingDataset, which makes
# a set endless by taking the next seed, adds one new item with each chunk. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check reasoning_gym==0.1.25
cat >"$tmp/finding.py" <<'EOF'
from importlib.metadata import version
from itertools import islice

import reasoning_gym
from reasoning_gym.dataset import ReseedingDataset

SIZE = 100


def questions(seed):
    return [item["question"] for item in reasoning_gym.create_dataset("basic_arithmetic", seed=seed, size=SIZE)]


print("reasoning_gym", version("reasoning_gym"))
training, held_out = questions(42), questions(43)
shared = len(set(training) & set(held_out))
print(f"{SIZE} questions with seed 42, {len(set(training))} of them different, and {SIZE} with seed 43")
print("expected in both: few, if any")
print(f"seen in both:     {shared}")

ten_chunks = ReseedingDataset(reasoning_gym.create_dataset("basic_arithmetic", seed=42, size=SIZE), chunk_size=SIZE)
different = len({item["question"] for item in islice(ten_chunks, 10 * SIZE)})
print(f"{10 * SIZE} items of ReseedingDataset, in chunks of {SIZE}")
print(f"expected: about {10 * SIZE} different questions")
print(f"seen:     {different}")
assert len(set(training)) == SIZE
assert shared == SIZE - 1 and held_out[:-1] == training[1:]
assert different < 1.2 * SIZE
EOF
cd "$tmp"
venv/bin/python -W ignore finding.py
