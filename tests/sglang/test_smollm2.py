"""A server of a real model, SmolLM2-135M, draws what the trainer would over its 49,152 tokens."""

from pathlib import Path

from megatron_troll.data.tokenizer import load_tokenizer
from tests.dist.harness import RankPool
from tests.sglang.farm import Farm
from tests.sglang.model import prompts_of
from tests.sglang.worker import Job, assert_the_trainers, draw_once
from tests.smollm2 import folder

K = 64
TEXTS = ("Write a short story about a lighthouse.", "What is 17 + 25?", "Name three uses of copper.")


def test_a_server_of_a_real_model_draws_what_the_trainer_would(
    farm: Farm, ranks2: RankPool, tmp_path: Path
) -> None:
    """The trainer's two stages share the embedding, and send every weight first."""
    prompts = prompts_of(TEXTS, load_tokenizer(folder()))
    server = farm.start(folder(), max_total_tokens=2048).wait_until_healthy()
    sglang = {"servers": (server.url,), "sync": {"via": "tensor"}, "probe": {"max_kl": 1e-6}}
    job = Job({"pp": 2}, folder(), tmp_path, sglang, {"max_tokens": 24}, prompts=prompts, samples=2, top_k=K)
    try:
        ranks = ranks2.run(draw_once, job)
    finally:
        server.kill()
    assert sum(len(drawn.response_ids) for drawn in ranks[0].rollouts) > 50
    assert_the_trainers(ranks, 1, top_k=K)
