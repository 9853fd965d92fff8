#!/usr/bin/env bash
# SGLang and transformers: attention_factor of YaRN, which transformers multiplies the sines and cosines by, is ignored
# by SGLang's rotary embedding; attn_factor, which SGLang multiplies its own factor by, is ignored by transformers. With
# one config.json the logits of attention differ by the square of the ratio. SGLang says nothing. No GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
install=("$tmp/venv/bin/pip" install --quiet --disable-pip-version-check)
# transformers is the release that SGLang requires; the rest is what importing its layers takes.
"${install[@]}" torch==2.13.0 torchvision==0.28.0 numpy==2.3.5 transformers==5.19.0 aiohttp==3.14.5 dill==0.4.1 \
    ipython==9.18.1 msgspec==0.22.0 orjson==3.13.0 pillow==13.0.0 psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 \
    pyzmq==27.3.0 requests==2.34.2 starlette==1.10.0
"${install[@]}" --no-deps sglang==0.5.23
cat >"$tmp/finding.py" <<'EOF'
from importlib.metadata import version

import torch
from sglang.srt.layers.rotary_embedding import get_rope
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HEAD, LENGTH, THETA = 8, 64, 10000.0
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16}


def in_sglang(rope):
    """Cosines and sines of every position, [LENGTH, HEAD]."""
    return get_rope(HEAD, HEAD, LENGTH, THETA, True, dict(rope), dtype=torch.float32).cos_sin_cache


def in_transformers(rope):
    config = LlamaConfig(
        hidden_size=HEAD, num_attention_heads=1, max_position_embeddings=LENGTH, rope_parameters=dict(rope)
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, LENGTH, HEAD), torch.arange(LENGTH)[None])
    return torch.cat([cos[0, :, : HEAD // 2], sin[0, :, : HEAD // 2]], -1)


print("sglang", version("sglang"), "transformers", version("transformers"), "torch", version("torch"))
print("expected: the same sines and cosines, whose scale is the cosine of position 0")
ratios = []
for keys in ({}, {"attention_factor": 1.0}, {"attn_factor": 0.5}):
    sglang, hugging_face = in_sglang(YARN | keys), in_transformers(YARN | keys)
    ratio = float(sglang[0, 0] / hugging_face[0, 0])
    torch.testing.assert_close(sglang, hugging_face * ratio)  # nothing else differs
    print(f"seen with {keys or 'neither key'}: {sglang[0, 0]:.4f} in SGLang, {hugging_face[0, 0]:.4f} in transformers")
    ratios.append(ratio)
assert abs(ratios[0] - 1) < 1e-6
assert abs(ratios[1] - 1) > 0.1, "SGLang reads attention_factor now"
assert abs(ratios[2] - 0.5) < 1e-6, "transformers reads attn_factor, or SGLang does not, now"
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 SGLANG_USE_CPU_ENGINE=1 venv/bin/python -W ignore finding.py
