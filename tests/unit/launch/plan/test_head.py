"""What the LM head of a GPU holds at once, counted by hand."""

from pathlib import Path

from megatron_troll.config import Layout, Model, ObjectiveConfig
from megatron_troll.launch.plan.head import logits_of
from megatron_troll.launch.plan.models import PUBLISHED
from megatron_troll.launch.plan.saved.flow import Flow
from megatron_troll.mcore.shape import read_shape
from megatron_troll.objectives.compose import compose


def test_whole_rows_of_2048_tokens_are_formed_at_a_time() -> None:
    """8,192 tokens of Qwen3-30B-A3B, vocabulary 151,936 on two ranks, bf16. Beside the chunk: three fp32
    numbers for each token. The chunk is what makes the GEMM large enough; twice or half as many tokens would
    change the memory of every preset."""
    model = Model(path="", dtype="bf16", layout=Layout(tp=2))
    flow = Flow(read_shape(Path(PUBLISHED) / "Qwen3-30B-A3B"), model, tokens=8192, te=True)
    logits = logits_of(flow, compose(ObjectiveConfig()))
    assert logits.dense == 2048 * (151_936 // 2) * 2 + 8192 * 12
    assert logits.whole == 8192 * (151_936 // 2) * 4
    fewer = logits_of(flow, compose(ObjectiveConfig()), chunk=512)
    assert fewer.dense == 512 * (151_936 // 2) * 2 + 8192 * 12
