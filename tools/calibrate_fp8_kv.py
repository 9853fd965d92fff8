"""Scales of an FP8 KV cache, for serve.kv_scales: from the largest key or value of each layer on prompts.

python tools/calibrate_fp8_kv.py MODEL_FOLDER PROMPTS.jsonl OUTPUT.json [--tp 1] [--count 256]

Runs the folder's Hugging Face model in its own dtype, on a GPU if there is one; holds one prompt's caches.
Prompts may have any schema that training accepts. SGLang has one scale per layer and tensor-parallel rank,
shared by keys and values; values larger than those seen here are clipped.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from megatron_troll.config import Data
from megatron_troll.data.prompts import load_prompts
from megatron_troll.data.template import ChatTemplate
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.launch.kv_scales import KVCache, KVScales

# The largest finite float8_e4m3fn.
LARGEST = torch.finfo(torch.float8_e4m3fn).max


@torch.no_grad()
def largest(model: torch.nn.Module, sequences: Iterable[Sequence[int]]) -> torch.Tensor:
    """[layers, heads] largest magnitudes among cached keys and values."""
    device, found = next(model.parameters()).device, []
    for ids in sequences:
        cache = model(torch.tensor([list(ids)], device=device), use_cache=True).past_key_values
        found.append(torch.stack([_magnitude(layer.keys, layer.values) for layer in cache.layers]))
    return torch.stack(found).amax(0).cpu()


def _magnitude(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads] largest magnitudes of keys and values [1, heads, tokens, width]."""
    return torch.maximum(keys.abs(), values.abs()).float().amax((0, 2, 3))


def scales(largest: torch.Tensor, family: str, hidden: int, tp: int) -> KVScales:
    """Scales of every rank, from the heads it holds; with more ranks than heads, ranks share a head."""
    heads = largest.shape[1]
    if heads % tp and tp % heads:
        raise SystemExit(f"--tp {tp}: {heads} heads of keys and values cannot be spread over as many ranks")
    each = max(1, heads // tp)
    first = [rank * heads // tp for rank in range(tp)]
    factors = {
        rank: dict(enumerate((largest[:, at : at + each].amax(1) / LARGEST).tolist()))
        for rank, at in enumerate(first)
    }
    return KVScales(model_type=family, hidden_size=hidden, kv_cache=KVCache(scaling_factor=factors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1, help="serve.tp")
    parser.add_argument("--count", type=int, default=256, help="prompts, from the front of the file")
    arguments = parser.parse_args()
    template = ChatTemplate(load_tokenizer(arguments.model))
    data = Data(files=(str(arguments.prompts),), held_out=1)
    prompts = load_prompts(data, 0, template).train[: arguments.count]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    ids = [prompt.ids.tolist() for prompt in prompts]
    config = model.config
    found = scales(largest(model, ids), config.model_type, config.hidden_size, arguments.tp)
    arguments.output.write_text(found.model_dump_json(indent=1) + "\n")
    print(f"wrote {arguments.output}: {len(ids)} prompts")


if __name__ == "__main__":
    main()
