#!/usr/bin/env bash
# transformers: in the older form of a config.json, rope_scaling null means plain RoPE with the rope_theta beside it;
# Llama's and Qwen's are read so. ApertusConfig takes Llama 3's scaling and theta 12,000,000 instead, and ignores the
# file's rope_theta, without a message. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cat >"$tmp/finding.py" <<'EOF'
import json
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig

folder = Path("model")
folder.mkdir()
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}


def read(model, **rope):
    (folder / "config.json").write_text(json.dumps({"model_type": model, **rope}))
    return AutoConfig.from_pretrained(folder).rope_parameters


print("transformers", version("transformers"))
print('a config.json with "rope_scaling": null, "rope_theta": 500000')
print("expected:        ", PLAIN)
seen = {name: read(name, rope_scaling=None, rope_theta=500000.0) for name in ("llama", "qwen3", "apertus")}
for name, rope in seen.items():
    print(f"seen: {name:10} ", rope)
named = read("apertus", rope_scaling={"rope_type": "default"}, rope_theta=500000.0)
print('seen of apertus with "rope_scaling": {"rope_type": "default"}:', named)
assert seen["llama"] == seen["qwen3"] == named == PLAIN
assert seen["apertus"]["rope_type"] == "llama3" and seen["apertus"]["factor"] == 8.0
assert seen["apertus"]["rope_theta"] == 12e6, "the file's rope_theta is read now"
EOF
cd "$tmp"
venv/bin/python -W ignore finding.py
