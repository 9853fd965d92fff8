"""Bytes that one rank sends in one rollout batch, by purpose.

In a collective over n ranks with S bytes in total, a rank sends (n - 1) / n of S: in an all-gather, a
reduce-scatter or an all-to-all; an all-reduce is the first two together. Small messages (numbers of tokens to
each rank, exchanges between the head's ranks, gradients of norms) are left out.
"""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

from megatron_troll.config import Train
from megatron_troll.launch.plan.activations import Work, flow_of
from megatron_troll.launch.plan.models import Planned
from megatron_troll.launch.plan.ranks import Ranks
from megatron_troll.launch.plan.saved.flow import FLOAT, Flow
from megatron_troll.launch.plan.states import WIDTHS


@dataclass(frozen=True)
class Traffic:
    """Bytes by purpose. tensor: all-gathers and reduce-scatters of sequence parallelism. expert: tokens to
    their experts and back (alltoall, or all-gather and reduce-scatter). expert_tensor: the same over the
    ranks that share an expert. context: keys and values, or heads of linear attention. pipeline: hidden
    states and their gradients between stages. gradients: summed over data-parallel ranks; weights: gathered
    again after the optimizer's step."""

    tensor: float = 0
    expert: float = 0
    expert_tensor: float = 0
    context: float = 0
    pipeline: float = 0
    gradients: float = 0
    weights: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))

    def times(self, factor: float) -> "Traffic":
        return Traffic(*(factor * getattr(self, f.name) for f in fields(Traffic)))


def share(ranks: int) -> float:
    """The fraction of a group's data that each of its ranks sends in a collective."""
    return (ranks - 1) / ranks


def forward(flow: Flow, kinds: Iterable[str]) -> Traffic:
    """Traffic of one micro-batch's forward through layers of these kinds."""
    return sum((_layer(flow, kind, backward=False) for kind in kinds), Traffic())


def backward(flow: Flow, kinds: Iterable[str]) -> Traffic:
    """Traffic of the backward through the same layers, recomputation included."""
    return sum((_layer(flow, kind, backward=True) + _again(flow, kind) for kind in kinds), Traffic())


def _again(flow: Flow, kind: str) -> Traffic:
    mode, modules = flow.model.recompute, flow.model.recompute_modules
    if mode == "full":
        return _layer(flow, kind, backward=False)
    total = Traffic()
    if mode == "selective" and {"moe", "mlp"} & set(modules):
        total += Traffic(tensor=_tensor(flow, _feeding(flow), 2)) + _experts(flow)
    if mode == "selective" and "core_attn" in modules and kind == "full_attention":
        total += Traffic(context=_keys(flow, backward=False))
    return total


def _layer(flow: Flow, kind: str, *, backward: bool) -> Traffic:
    # Two all-gathers or reduce-scatters per block; backward also gathers the first matrix's input again.
    sequence = _tensor(flow, 1 + _feeding(flow), 3 if backward else 2)
    between = _keys(flow, backward) if kind == "full_attention" else _heads(flow)
    return Traffic(tensor=sequence, context=between) + _experts(flow)


def _feeding(flow: Flow) -> int:
    """Number of feed-forward blocks of a layer that are cut over tensor-parallel ranks."""
    return int(bool(flow.shape.shared_expert_ffn)) if flow.shape.experts else 1


def _tensor(flow: Flow, blocks: int, collectives: int) -> float:
    return share(flow.model.layout.tp) * flow.hidden(flow.tokens) * blocks * collectives


def _keys(flow: Flow, backward: bool) -> float:
    """Keys and values, all-gathered; in backward their gradients, reduce-scattered. Transformer Engine also
    sends the keys and values in backward."""
    layout, shape = flow.model.layout, flow.shape
    keys = 2 * flow.width * flow.tokens * layout.cp * shape.kv_heads // layout.tp * shape.head_dim
    return share(layout.cp) * keys * (2 if backward and flow.te else 1)


def _heads(flow: Flow) -> float:
    """The delta rule's inputs, sent to the rank of their heads, and its outputs, sent back."""
    layout, linear = flow.model.layout, flow.shape.linear
    assert linear is not None
    numbers = 2 * linear.key_width + 2 * linear.value_width + 2 * linear.value_heads
    return share(layout.cp) * flow.width * flow.tokens * numbers // layout.tp


def _experts(flow: Flow) -> Traffic:
    if not flow.shape.experts:
        return Traffic()
    layout, hidden = flow.model.layout, flow.shape.hidden
    there, weight, back = flow.width * hidden, FLOAT, flow.width * hidden
    if flow.model.moe.dispatcher == "allgather":
        ranks, rows = layout.ep * layout.etp, flow.shard
        sent = there + (FLOAT + 1) * flow.shape.experts + FLOAT * hidden
        return Traffic(expert=share(ranks) * ranks * rows * sent)
    sent = share(layout.ep) * flow.routed * (there + weight + back)
    # Sums over the ranks that share an expert are computed in fp32.
    shared = share(layout.etp) * flow.received * (there + weight + FLOAT * hidden)
    return Traffic(expert=sent, expert_tensor=shared)


def ends(flow: Flow, ranks: Ranks, stage: int) -> Traffic:
    """The embedding's reduce-scatter and the head's all-gather, in one direction (forward or backward)."""
    here = (stage == 0) + (stage == ranks.layout.pp - 1)
    return Traffic(tensor=_tensor(flow, here, 1))


def between_stages(flow: Flow, ranks: Ranks, stage: int) -> Traffic:
    """Hidden states to the next stage and gradients to the previous one, for one micro-batch."""
    if ranks.layout.pp == 1:
        return Traffic()
    sends = ranks.chunks * 2 - (stage == ranks.layout.pp - 1) - (stage == 0)
    return Traffic(pipeline=sends * flow.hidden(flow.shard))


def of_step(planned: Planned, stage: int) -> Traffic:
    """Traffic of one optimizer step: sums of gradients, and gathering of new weights."""
    model, ranks, total = planned.model, planned.ranks, Traffic()
    for chunk in planned.buffers[stage]:
        # The first and the last stage sum their gradients of a tied embedding.
        total += Traffic(gradients=FLOAT * chunk.shared)
        for kind, size in (("tensor", ranks.layout.tp), ("expert_tensor", ranks.layout.etp)):
            # Muon needs whole matrices: each rank sends its part to all others.
            total += Traffic(**{kind: FLOAT * (size - 1) * chunk.gathered.get(kind, 0.0)})
        for buffers, size in ((chunk.of_dense, ranks.dp_cp), (chunk.of_experts, ranks.expert_dp)):
            numbers = share(size) * sum(buffer.numel for buffer in buffers)
            if model.optimizer.distributed:
                total += Traffic(gradients=FLOAT * numbers, weights=WIDTHS[model.dtype] * numbers)
            else:
                total += Traffic(gradients=2 * FLOAT * numbers)
    return total


def of_forward(planned: Planned, work: Work, stage: int) -> Traffic:
    """Traffic of one micro-batch's forward."""
    flow, ranks = flow_of(planned, work), planned.ranks
    there = forward(flow, _kinds(planned, stage)) + ends(flow, ranks, stage)
    return there + between_stages(flow, ranks, stage).times(0.5)


def of_training(planned: Planned, work: Work, stage: int) -> Traffic:
    """Traffic of one micro-batch's forward and backward."""
    flow, ranks = flow_of(planned, work), planned.ranks
    back = backward(flow, _kinds(planned, stage)) + ends(flow, ranks, stage)
    return of_forward(planned, work, stage) + back + between_stages(flow, ranks, stage).times(0.5)


def _kinds(planned: Planned, stage: int) -> list[str]:
    ranks, shape = planned.ranks, planned.shape
    chunks = [ranks.layers(stage, chunk, shape.layers) for chunk in range(ranks.chunks)]
    return [shape.layer_types[layer] for layers in chunks for layer in layers]


def of_batch(planned: Planned, work: Work, train: Train, forwards: int) -> Traffic:
    """Traffic of one rollout batch with `forwards` without gradient, on the stage that sends the most."""
    micro = work.responses * work.tokens / work.micro_tokens

    def of_stage(stage: int) -> Traffic:
        alone = of_forward(planned, work, stage).times(forwards)
        trained = of_training(planned, work, stage).times(train.epochs)
        return (alone + trained).times(micro) + of_step(planned, stage).times(train.updates)

    return max(map(of_stage, range(planned.ranks.layout.pp)), key=lambda sent: sum(astuple(sent)))
