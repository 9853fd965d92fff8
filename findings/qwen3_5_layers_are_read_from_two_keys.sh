#!/usr/bin/env bash
# transformers and SGLang: which layers of Qwen3.5 have full attention can stand in two keys. transformers reads
# layer_types, makes them from full_attention_interval if they are absent, and then saves them without the interval
# (5.23.0 too). SGLang reads only full_attention_interval: it does not find it in such a file, and where both keys are
# there and differ, it builds other layers than transformers, without a message. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
install=("$tmp/venv/bin/pip" install --quiet --disable-pip-version-check)
# transformers is the release that SGLang requires; the rest is what importing its configs takes.
"${install[@]}" torch==2.13.0 torchvision==0.28.0 numpy==2.3.5 transformers==5.19.0 aiohttp==3.14.5 dill==0.4.1 \
    ipython==9.18.1 msgspec==0.22.0 orjson==3.13.0 pillow==13.0.0 psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 \
    pyzmq==27.3.0 requests==2.34.2 starlette==1.10.0
"${install[@]}" --no-deps sglang==0.5.23
cat >"$tmp/finding.py" <<'EOF'
import json
from importlib.metadata import version
from pathlib import Path

import transformers
from sglang.srt.configs.qwen3_5 import Qwen3_5TextConfig

EVERY_SECOND = ["linear_attention", "full_attention"] * 2


def full(types):
    """The numbers of the layers with full attention, which SGLang calls just attention."""
    return [i for i, kind in enumerate(types) if kind in ("full_attention", "attention")]


def saved(**keys):
    """config.json of a text model with four layers, as transformers writes it."""
    transformers.Qwen3_5TextConfig(num_hidden_layers=4, **keys).save_pretrained("model")
    return json.loads(Path("model/config.json").read_text())


print("transformers", version("transformers"), "sglang", version("sglang"))
config = saved(full_attention_interval=2)
found = hasattr(Qwen3_5TextConfig(**config), "full_attention_interval")
print("four layers made with full_attention_interval=2, saved by transformers")
print("expected: the file has the key, and so has SGLang's config of it")
print("seen: in the file:", "full_attention_interval" in config, "in SGLang's config:", found, end="; ")
print("layer_types in the file:", config["layer_types"])

both = saved(full_attention_interval=4, layer_types=EVERY_SECOND)
in_transformers = full(transformers.AutoConfig.from_pretrained("model").layer_types)
in_sglang = full(Qwen3_5TextConfig(**both).layers_block_type)
print("layer_types with full attention in layers [1, 3], beside full_attention_interval 4")
print("expected: both take [1, 3], or one of them refuses the file")
print(f"seen: transformers {in_transformers}, SGLang {in_sglang}")
assert config["layer_types"] == EVERY_SECOND
assert "full_attention_interval" not in config and not found, "the interval is kept now"
assert (in_transformers, in_sglang) == ([1, 3], [3]), "both read the same key now"
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 SGLANG_USE_CPU_ENGINE=1 venv/bin/python -W ignore finding.py
