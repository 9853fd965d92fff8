"""Bytes that each stage's chunks keep for backward, over the micro-batches that are in flight at once."""

from dataclasses import dataclass

from megatron_troll.launch.plan.models import Planned
from megatron_troll.launch.plan.pipeline import Work, in_flight
from megatron_troll.launch.plan.saved.flow import Flow, SavedBytes
from megatron_troll.launch.plan.saved.layers import NOTHING, Recompute, final_norm, of_layers


@dataclass(frozen=True)
class Activations:
    """kept: by all micro-batches in flight, what is computed again included; experts: of it, what depends on
    where tokens are routed, taken to be even; in_flight: forwards of a chunk that wait for their backward."""

    kept: int
    experts: int
    in_flight: int


def flow_of(planned: Planned, work: Work) -> Flow:
    model, tokens = planned.model, work.micro_tokens // planned.ranks.layout.cp
    return Flow(planned.shape, model, tokens, te=model.spec != "local")


def activations_of(planned: Planned, work: Work, stage: int, mode: Recompute) -> Activations:
    """The chunk of this stage that keeps the most, times the forwards in flight."""
    flow, flying = flow_of(planned, work), in_flight(planned.ranks, stage, work.micro_batches)
    chunks = [_chunk(planned, flow, stage, i, mode) for i in range(planned.ranks.chunks)]
    most = max(chunks, key=lambda saved: saved.kept)
    return Activations(flying * most.kept + most.again, flying * most.experts, flying)


def _chunk(planned: Planned, flow: Flow, stage: int, chunk: int, mode: Recompute) -> SavedBytes:
    layers = of_layers(flow, planned.ranks.layers(stage, chunk, planned.shape.layers), mode)
    return layers + (final_norm(flow) if planned.ranks.is_last(stage, chunk) else NOTHING)


def working_set(flow: Flow) -> int:
    """Gradients on their way through the widest part of a layer: an estimate."""
    shape, layout = flow.shape, flow.model.layout
    if shape.experts:
        return flow.received * flow.width * (2 * shape.hidden + 3 * shape.expert_ffn // layout.etp)
    return flow.tokens * flow.width * (2 * shape.hidden + 3 * shape.ffn // layout.tp)


def between_stages(planned: Planned, flow: Flow, stage: int, flying: int) -> int:
    """Hidden states that a stage got and gave, until their backward."""
    if planned.ranks.layout.pp == 1:
        return 0
    ends = (stage > 0) + (stage < planned.ranks.layout.pp - 1)
    return ends * flying * flow.hidden(flow.shard)
