"""Servers of each family draw what the trainer would, from the weights that it sent."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import RankPool
from tests.dist.tiny import write_reference
from tests.dist.tiny_families import APERTUS, LLAMA, QWEN2, QWEN3_YARN, SMOLLM3
from tests.sglang.farm import Farm
from tests.sglang.model import END_ID, TOKENIZER, VOCAB
from tests.sglang.worker import TOLERANCE, Job, assert_the_trainers, draw_once

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "smollm3": SMOLLM3,
    "apertus": APERTUS,
    "qwen3-yarn": QWEN3_YARN,
}
SIZES = {"vocab_size": VOCAB, "hidden_size": 128, "eos_token_id": END_ID, "bos_token_id": None}
# SGLang has xIELU's scalars in bf16 also in fp32; other weights would be off by far more.
ROUNDED = 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_server_draws_what_the_trainer_would(
    name: str, farm: Farm, ranks2: RankPool, tmp_path: Path
) -> None:
    served, trained = (write(FAMILIES[name], tmp_path / str(seed), seed) for seed in (1, 2))
    server = farm.start(served).wait_until_healthy()
    tolerance = ROUNDED if name == "apertus" else TOLERANCE
    probe = {"max_kl": tolerance / 100}
    sglang = {"servers": (server.url,), "sync": {"via": "tensor"}, "probe": probe}
    try:
        ranks = ranks2.run(draw_once, Job({"tp": 2}, trained, tmp_path, sglang, {"max_tokens": 12}))
    finally:
        server.kill()
    assert_the_trainers(ranks, 1, tolerance)


def write(config: dict[str, Any], folder: Path, seed: int) -> Path:
    write_reference(config | SIZES, folder, seed)
    TOKENIZER.save_pretrained(folder)
    return folder
