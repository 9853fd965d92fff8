"""`mtroll plan` against ranks of tiny models: states to the byte, saved tensors and traffic within 10 %."""

from dataclasses import asdict, dataclass, field
from typing import Any

import pytest

from megatron_troll.config import Layout, Model, ObjectiveConfig, Slot
from megatron_troll.launch.plan import buffers, communication
from megatron_troll.launch.plan.activations import Work, activations_of, flow_of
from megatron_troll.launch.plan.head import saved_by_head
from megatron_troll.launch.plan.models import Planned, planned_of
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives.compose import compose
from tests.dist.plan_worker import BUCKET, measure
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import APERTUS, LLAMA, QWEN2, QWEN3_5_MOE, QWEN3_5_TEXT, SMOLLM3

TOKENS = 256
# Bytes a token of what plans leave out: what tensor-parallel ranks tell each other in the head, and sums of
# the gradients of norms and routers; of the rest next to none. Of a full-sized model it is less than 1 %.
SMALL = dict.fromkeys(asdict(communication.Traffic()), 2) | {"tensor": 160}
CLIP = compose(ObjectiveConfig(trust_region=Slot(name="clip")))


@dataclass(frozen=True)
class Case:
    """A tiny model on `world` ranks; what else its configuration says."""

    world: int
    layout: dict[str, int]
    sizes: dict[str, Any] = field(default_factory=lambda: MOE)
    fields: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1


BF16 = {"dtype": "bf16"}
SELECTIVE = {"recompute": "selective", "recompute_modules": ("core_attn", "mlp")}
CASES = {
    "one-rank": Case(1, {}),
    "one-rank-bf16": Case(1, {}, fields=BF16),
    "dense-tied-pp2": Case(2, {"pp": 2}, DENSE | {"tie_word_embeddings": True}, BF16, 3),
    "tp2-etp2": Case(2, {"tp": 2, "etp": 2}, fields=BF16 | {"recompute": "full"}),
    "ep2-no-distributed-optimizer": Case(2, {"ep": 2}, fields={"optimizer": {"distributed": False}}),
    "ep2-allgather": Case(2, {"ep": 2}, fields={"moe": {"dispatcher": "allgather"}}),
    "ep2-frozen-routers": Case(2, {"ep": 2}, fields=BF16 | {"moe": {"freeze_router": True}}),
    "cp2": Case(2, {"cp": 2}, fields={"recompute": "selective"}),
    "pp2-interleaved": Case(2, {"pp": 2, "vpp": 2}, fields=BF16, micro_batches=4),
    "tp2-pp2-ep2": Case(4, {"tp": 2, "pp": 2, "ep": 2}, fields=BF16, micro_batches=3),
    "tp2-ep2-dp2": Case(
        4, {"tp": 2, "ep": 2}, fields=BF16 | {"recompute": "selective", "recompute_modules": ("moe",)}
    ),
    "dp2-overlapped": Case(2, {}, fields=BF16 | {"optimizer": {"overlap_grad_reduce": True}}),
    "tp2": Case(2, {"tp": 2}, fields=BF16),
    "tp2-dp2": Case(4, {"tp": 2}, fields=BF16),
    "muon": Case(2, {}, fields=BF16 | {"optimizer": {"name": "muon"}}),
    "muon-fp32": Case(2, {"ep": 2}, fields={"optimizer": {"name": "muon", "distributed": False}}),
    "muon-hybrid-tp2-ep2-dp2": Case(4, {"tp": 2, "ep": 2}, NEXT, BF16 | {"optimizer": {"name": "muon"}}),
    "muon-tied-overlapped": Case(
        4,
        {"pp": 2},
        DENSE | {"tie_word_embeddings": True},
        BF16 | {"optimizer": {"name": "muon", "overlap_grad_reduce": True}},
        micro_batches=3,
    ),
    "llama": Case(1, {}, LLAMA),
    "llama-tp2-bf16": Case(2, {"tp": 2}, LLAMA, BF16),
    "apertus-tp2": Case(2, {"tp": 2}, APERTUS),
    "smollm3-pp2-bf16": Case(2, {"pp": 2}, SMOLLM3, BF16),
    "qwen2-selective": Case(1, {}, QWEN2, BF16 | SELECTIVE),
    "hybrid": Case(1, {}, NEXT, BF16),
    "dense-hybrid-tp2": Case(2, {"tp": 2}, QWEN3_5_TEXT, BF16),
    "hybrid-beside-vision-ep2": Case(2, {"ep": 2}, QWEN3_5_MOE, BF16 | {"recompute": "full"}),
    "hybrid-tp2-cp2-ep2": Case(4, {"tp": 2, "cp": 2, "ep": 2}, NEXT),
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_ranks_hold(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "BUCKET", BUCKET)
    monkeypatch.setattr(buffers, "BUCKET_PER_RANK", 0)
    case = CASES[name]
    planned = plan_of(case)
    arguments = (planned.model, case.sizes, TOKENS, case.micro_batches, CLIP.reads)
    ranks = request.getfixturevalue(f"ranks{case.world}")
    for rank, held in enumerate(ranks.run(measure, *arguments)):
        states = planned.states(rank)
        assert (held.weights, held.gradients, held.optimizer) == (
            states.weights,
            states.gradients,
            states.optimizer,
        )
        assert saved(planned, case, rank) == pytest.approx(held.saved, rel=0.1), f"rank {rank}"
        for kind, planned_bytes in sent(planned, case, rank).items():
            few = SMALL[kind] * TOKENS * case.micro_batches
            assert held.sent.get(kind, 0) == pytest.approx(planned_bytes, rel=0.1, abs=few), (
                f"rank {rank}: {kind}"
            )


def plan_of(case: Case) -> Planned:
    model = Model.model_validate(
        {"path": "none", "dtype": "fp32", "spec": "local", "layout": Layout(**case.layout)} | case.fields
    )
    return planned_of("policy", model, shape_of(case.sizes), case.world)


def sent(planned: Planned, case: Case, rank: int) -> dict[str, float]:
    work, stage = Work(TOKENS, 2, case.micro_batches, TOKENS), planned.ranks.stage(rank)
    passes = communication.of_training(planned, work, stage).times(case.micro_batches)
    return asdict(passes + communication.of_step(planned, stage))


def saved(planned: Planned, case: Case, rank: int) -> int:
    ranks = planned.ranks
    stage, layout = ranks.stage(rank), ranks.layout
    work = Work(TOKENS, 2, case.micro_batches, TOKENS)
    kept = activations_of(planned, work, stage, planned.model.recompute).kept
    last = stage == layout.pp - 1
    return kept + (saved_by_head(flow_of(planned, work), CLIP) if last else 0)
