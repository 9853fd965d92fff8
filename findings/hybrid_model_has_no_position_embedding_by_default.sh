#!/usr/bin/env bash
# megatron-core: HybridModel has no position embedding by default (GPTModel, which it replaces, has one). A model of
# attention layers then does not see the order of earlier tokens. GPTModel's notice of deprecation names HybridModel;
# position_embedding_type must be said. Needs no GPU.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3.12}" -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 megatron-core==0.19.2 numpy==2.3.5
cat >"$tmp/finding.py" <<'EOF'
import inspect
from importlib.metadata import version

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, model_parallel_cuda_manual_seed
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
model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
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
config = TransformerConfig(
    num_layers=1, hidden_size=16, num_attention_heads=2, init_method_std=0.5, masked_softmax_fusion=False,
    hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
)


def last_logits(tokens, **options):
    torch.manual_seed(0)
    model = HybridModel(config, spec, vocab_size=32, max_sequence_length=8, hybrid_layer_pattern="*", **options)
    ids = torch.tensor([tokens])
    later = torch.ones(len(tokens), len(tokens)).triu(1).bool()[None, None]
    return model(ids, torch.arange(len(tokens))[None], later)[0, -1].detach()


def difference(**options):
    """Of the last token's logits, when the tokens before it change places."""
    return float((last_logits([3, 7, 11, 5], **options) - last_logits([11, 3, 7, 5], **options)).abs().max())


parameter = "position_embedding_type"
default = {kind: inspect.signature(kind).parameters[parameter].default for kind in (GPTModel, HybridModel)}
plain, rope = difference(), difference(position_embedding_type="rope")
for kind, value in default.items():
    print(f"{kind.__name__}: position_embedding_type is {value!r} by default")
print("largest change of the last token's logits when the tokens before it change places:")
print(f"expected: not 0, as with rope: {rope:.3f}")
print(f"seen with HybridModel's default: {plain:.1e}")
assert default == {GPTModel: "learned_absolute", HybridModel: "none"}
assert plain < 1e-5 and rope > 1e-2
dist.destroy_process_group()
EOF
cd "$tmp"
CUDA_VISIBLE_DEVICES='' venv/bin/python -W ignore finding.py
