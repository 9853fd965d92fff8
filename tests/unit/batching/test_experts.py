"""Recorded experts reach the router that meets their token, in every form; what is no record is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.experts import Routing, expert_dtype
from megatron_troll.types import Rollout
from tests.unit.batching.samples import VOCAB, random_rollouts, rollout

ROUTING = Routing(layers=(1, 2), model_layers=4, experts=400, per_token=3, tp_rank=0)


def recorded(one: Rollout) -> Rollout:
    """Token i of sample n goes to experts 100 n + i, and its layer more, in each place."""
    tokens = len(one.prompt_ids) + len(one.response_ids) - 1
    first = 50 * one.sample + np.arange(tokens)[:, None, None] + np.arange(4)[:, None]
    return replace(one, experts=(first + np.arange(3) * 5).astype(np.uint16))


ROLLOUTS = [recorded(one) for one in random_rollouts(5)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_every_token_keeps_its_experts(packed: bool, cp: int, tp: int) -> None:
    chosen, ones = [3, 0, 4], [1.0] * 5
    for cp_rank in range(cp):
        form = Form(VOCAB, packed=packed, cp_rank=cp_rank, cp_size=cp, tp_size=tp)
        ranks = [replace(form, routing=replace(ROUTING, tp_rank=rank)) for rank in range(tp)]
        batches = [build(ROLLOUTS, ones, ones, chosen, each) for each in ranks]
        batch = batches[0]
        starts = batch.cu_seqlens
        length = torch.tensor([batch.tokens.shape[1]]) if starts is None else starts.diff() // cp
        owner = torch.arange(len(length)).repeat_interleave(length)
        for layer in ROUTING.layers:
            parts = [each.experts[layer] for each in batches if each.experts is not None]
            assert {len(part) for part in parts} == {batch.tokens.numel() // tp}
            found = torch.cat(parts).view(batch.tokens.shape[1], -1, 3).transpose(0, 1)
            for row in range(len(batch.tokens)):
                for place in (~batch.padding[row]).nonzero()[:, 0].tolist():
                    sample = chosen[row if starts is None else int(owner[place])]
                    experts = ROLLOUTS[sample].experts
                    assert experts is not None
                    wanted = experts[int(batch.positions[row, place]), layer]
                    assert found[row, place].tolist() == wanted.tolist()


def test_a_micro_batch_without_a_rollout_has_rows_for_its_padding() -> None:
    batch = build([], [], [], [], Form(VOCAB, tp_size=2, routing=ROUTING))
    assert batch.experts is not None
    assert {layer: tuple(experts.shape) for layer, experts in batch.experts.items()} == {1: (1, 3), 2: (1, 3)}


def test_experts_move_with_the_batch_and_are_small() -> None:
    batch = build(ROLLOUTS, [1.0] * 5, [1.0] * 5, [1], Form(VOCAB, routing=ROUTING)).to(torch.device("cpu"))
    assert batch.experts is not None
    assert all(experts.dtype == torch.uint16 for experts in batch.experts.values())
    assert (expert_dtype(255), expert_dtype(256)) == (np.uint8, np.uint16)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "the engine returned no experts, which train.replay=rollout replays"),
        (np.zeros((3, 4, 3), np.uint8), r"shape \(3, 4, 3\); .* are \(4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.uint8), r"token 0 went to \[0, 0, 0\] in layer 0; expected ascending"),
        (np.full((4, 4, 3), [1, 2, 400], np.uint16), r"\[1, 2, 400\] in layer 0; .* below 400"),
    ],
)
def test_what_cannot_be_replayed_names_the_sample(experts: np.ndarray | None, message: str) -> None:
    one = replace(rollout([1, 2], [3, 4, 5]), experts=experts)
    with pytest.raises(ValueError, match=f"sample p#0: .*{message}"):
        build([one], [1.0], [1.0], [0], Form(VOCAB, routing=ROUTING))
