"""Micro-batches of an optimizer step, how many of them a stage keeps at once (1F1B, with or without
interleaving), and the bytes that they keep for backward."""

from dataclasses import dataclass

from megatron_troll.checks import data_of
from megatron_troll.config import Config
from megatron_troll.launch.plan.models import Planned
from megatron_troll.launch.plan.ranks import Ranks
from megatron_troll.launch.plan.saved.flow import Flow, SavedBytes
from megatron_troll.launch.plan.saved.layers import NOTHING, Recompute, final_norm, of_layers


@dataclass(frozen=True)
class Work:
    """Work of one data-parallel rank for one rollout batch in which every answer has maximum length.

    tokens          tokens of a response with its prompt, as the model reads it
    responses       responses of the rollout batch on this rank
    micro_batches   micro-batches of one optimizer step
    micro_tokens    most tokens of one micro-batch, over its context-parallel ranks
    """

    tokens: int
    responses: int
    micro_batches: int
    micro_tokens: int


def work_of(config: Config, ranks: Ranks) -> Work:
    train = config.train
    longest = data_of(config).max_prompt_tokens + config.rollout.sampling.max_tokens - 1
    align = 2 * ranks.layout.cp * ranks.layout.tp if ranks.layout.cp > 1 else ranks.layout.tp
    length = -(-longest // align) * align
    budget = max(train.token_budget // align * align, length)
    responses = -(-config.rollout.prompts * config.rollout.samples // ranks.dp)
    step = -(-responses * train.epochs // train.updates)
    micro = -(-step // _responses(config, budget, length, align))
    multiple = ranks.layout.pp if ranks.layout.vpp else 1
    return Work(longest, responses, -(-micro // multiple) * multiple, budget)


def _responses(config: Config, budget: int, length: int, align: int) -> int:
    """Responses of maximum length that a micro-batch holds."""
    prompt, samples = data_of(config).max_prompt_tokens, config.rollout.samples
    own = -(-(length - prompt) // align) * align
    if not config.train.share_prefixes:
        return budget // length
    groups = budget // (prompt + samples * own)
    return groups * samples or max(1, (budget - prompt) // own)


def in_flight(ranks: Ranks, stage: int, micro_batches: int) -> int:
    """The most forwards of one chunk that wait for their backward on a stage."""
    pp, chunks = ranks.layout.pp, ranks.chunks
    ahead = pp - stage - 1 if chunks == 1 else 2 * (pp - stage - 1) + (chunks - 1) * pp
    return min(ahead + 1, micro_batches * chunks)


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank. kept: for all micro-batches in flight, recomputed activations included; experts: the
    part of `kept` that depends on routing, assumed to be even; in_flight: forwards of a chunk that wait for
    their backward."""

    kept: int
    experts: int
    in_flight: int


def flow_of(planned: Planned, work: Work) -> Flow:
    model, tokens = planned.model, work.micro_tokens // planned.ranks.layout.cp
    return Flow(planned.shape, model, tokens, te=model.spec != "local")


def activations_of(planned: Planned, work: Work, stage: int, mode: Recompute) -> Activations:
    """Activations of the chunk of this stage that keeps the most, times the forwards in flight."""
    flow, flying = flow_of(planned, work), in_flight(planned.ranks, stage, work.micro_batches)
    chunks = [_chunk(planned, flow, stage, i, mode) for i in range(planned.ranks.chunks)]
    most = max(chunks, key=lambda saved: saved.kept)
    return Activations(flying * most.kept + most.again, flying * most.experts, flying)


def _chunk(planned: Planned, flow: Flow, stage: int, chunk: int, mode: Recompute) -> SavedBytes:
    layers = of_layers(flow, planned.ranks.layers(stage, chunk, planned.shape.layers), mode)
    return layers + (final_norm(flow) if planned.ranks.is_last(stage, chunk) else NOTHING)


def working_set(flow: Flow) -> int:
    """Estimated bytes of the gradients in the backward pass of a layer's widest part."""
    shape, layout = flow.shape, flow.model.layout
    if shape.experts:
        return flow.received * flow.width * (2 * shape.hidden + 3 * shape.expert_ffn // layout.etp)
    wide = 3 if shape.gated else 2
    return flow.tokens * flow.width * (2 * shape.hidden + wide * shape.ffn // layout.tp)


def between_stages(planned: Planned, flow: Flow, stage: int, flying: int) -> int:
    """Bytes of the hidden states that a stage received and sent, held until their backward."""
    if planned.ranks.layout.pp == 1:
        return 0
    ends = (stage > 0) + (stage < planned.ranks.layout.pp - 1)
    return ends * flying * flow.hidden(flow.shard)
