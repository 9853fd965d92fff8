#!/usr/bin/env bash
# megatron-core: HybridModel builds as many layers as hybrid_layer_pattern has symbols. It never compares that with
# config.num_layers, so a pattern of another length gives half a model (or two) without a word. Every layer still
# scales its initial weights by num_layers. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import logging
from importlib.metadata import version

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

torch.cuda.current_device = torch.cpu.current_device  # so that no GPU is needed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
print("torch", version("torch"), "megatron-core", version("megatron-core"))

attention = SelfAttentionSubmodules(ColumnParallelLinear, DotProductAttention, RowParallelLinear)
layer = TransformerLayerSubmodules(
    input_layernorm=WrappedTorchNorm,
    self_attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
    self_attn_bda=get_bias_dropout_add,
)
stack = HybridStackSubmodules(attention_layer=ModuleSpec(TransformerLayer, submodules=layer))
# The last norm is Transformer Engine's whatever the spec says: left out here.
spec = ModuleSpec(HybridStack, {"post_layer_norm": False}, stack)

warned = []
watch = logging.Handler(logging.WARNING)
watch.emit = lambda record: warned.append(record.getMessage())
logging.getLogger().addHandler(watch)

config = TransformerConfig(num_layers=8, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True)
built = {}
for pattern in ("*" * 8, "*" * 4, "*" * 16):
    model = HybridModel(config, spec, vocab_size=32, max_sequence_length=8, hybrid_layer_pattern=pattern)
    built[pattern] = len(model.decoder.layers)
    print(f"num_layers {config.num_layers}, pattern {pattern!r}: {built[pattern]} layers")

print("expected: an error for a pattern that does not have num_layers symbols")
print(f"seen: as many layers as symbols; warnings: {warned}")
assert list(built.values()) == [8, 4, 16] and not warned
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
