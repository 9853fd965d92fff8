"""What a rank of a tiny model holds: bytes of weights, gradients, optimizer state and saved tensors."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_troll.batching.build import Form, build
from megatron_troll.config import Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.optimizer import Trainable, chained, trainable
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import Groups
from megatron_troll.types import HeadRequest, Message, MicroBatch, Prompt, Rollout
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource
from tests.dist.layouts_worker import buckets_of
from tests.dist.tiny import started

BUCKET = 5000


@dataclass(frozen=True)
class Held:
    """Bytes. saved: the most that autograd kept at once for backward, parameters excluded; sent: by kind of
    Traffic."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    sent: dict[str, float]


def measure(
    config: Model, sizes: dict[str, Any], tokens: int, micro_batches: int, reads: HeadRequest
) -> Held:
    """One optimizer step of micro-batches of `tokens` tokens in two sequences, over all context-parallel
    ranks. Gradients that are reduced during backward are so in buckets of BUCKET numbers."""
    shape = shape_of(sizes)
    with started(config.layout) as groups, buckets_of(BUCKET):
        model = mcore.build(config, shape, groups)
        load(model, RandomSource(shape, 0))
        policy = trainable(model, config.optimizer, total_steps=1)
        form = Form(shape.vocab, cp_rank=groups.cp.rank, cp_size=groups.cp.size, tp_size=groups.tp.size)
        batches = [packed(tokens, shape.vocab, form, seed) for seed in range(micro_batches)]
        head = Head(model)

        def loss(i: int, hidden: Tensor) -> tuple[Tensor, None]:
            readings = head.read(hidden, batches[i].target, reads)
            values = readings.logp if readings.topk is None else readings.topk.logits.logsumexp(1)
            assert values is not None
            return (batches[i].weight * values).sum(), None

        saved = SavedTensors(kept_anyway(model, batches))
        with Sent(groups) as sent:
            with saved:
                accumulate(model, batches, loss)
            policy.step()
        held = weights_of(model), gradients_of(model), optimizer_of(policy)
        return Held(*held, saved.peak, dict(sent.bytes))


def packed(tokens: int, vocab: int, form: Form, seed: int) -> MicroBatch:
    """Two responses that fill `tokens` together, a quarter and the rest."""
    generator = np.random.default_rng(seed)
    responses = [response(generator.integers(0, vocab, n)) for n in (tokens // 4, tokens - tokens // 4)]
    return build(responses, [1.0, 1.0], [1.0 / tokens] * 2, [0, 1], form)


def response(ids: np.ndarray) -> Rollout:
    """All of it carries loss but the prompt, its first token."""
    n = len(ids)
    return Rollout(
        prompt=Prompt("p", (Message("user", "?"),), answer=""),
        group=0,
        sample=0,
        prompt_ids=ids[:1],
        response_ids=ids,
        marks=np.ones(n, np.int32),
        logp=np.zeros(n, np.float32),
        key=0,
        topk=None,
        text="",
        finish="stop",
        temperature=1.0,
    )


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of storages that autograd keeps, each once, while it keeps them; not those in
    `excluded`."""

    def __init__(self, excluded: set[int]) -> None:
        super().__init__(self._pack, lambda kept: kept.tensor if isinstance(kept, Kept) else kept)
        self.excluded = excluded
        self.users: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def _pack(self, tensor: Tensor) -> Any:
        return tensor if storage(tensor) in self.excluded else Kept(self, tensor)

    def take(self, tensor: Tensor) -> None:
        self.users[storage(tensor)] += 1
        if self.users[storage(tensor)] == 1:
            self.bytes += tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.bytes)

    def leave(self, tensor: Tensor) -> None:
        self.users[storage(tensor)] -= 1
        if self.users[storage(tensor)] == 0:
            self.bytes -= tensor.untyped_storage().nbytes()


class Kept:
    """A saved tensor, for as long as the graph holds it."""

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        counter.take(tensor)

    def __del__(self) -> None:
        self.counter.leave(self.tensor)


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives and to its neighbours, by kind of Traffic."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        kinds = {"tp": "tensor", "cp": "context", "ep": "expert", "etp": "expert_tensor", "pp": "pipeline"}
        handles = {kind: getattr(groups, axis).handle for axis, kind in kinds.items()}
        self.kinds = {handle.group_name: kind for kind, handle in handles.items() if handle is not None}
        both = parallel_state.get_expert_tensor_and_model_parallel_group()
        self.kinds.setdefault(both.group_name, "expert")
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            for arg in args:
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                    self._count(func._opname, args, dist.ProcessGroup.unbox(arg))
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any, group: dist.ProcessGroup) -> None:
        # Two stages send to each other over the world's group too, lest they wait for each other.
        other = "pipeline" if operation == "send" else "weights" if "allgather" in operation else "gradients"
        kind = self.kinds.get(group.group_name, other)
        self.bytes[kind] += sent(operation, args, group.size(), group.rank())


def sent(operation: str, args: Any, ranks: int, rank: int) -> float:
    """Bytes; what is broadcast, received or waited for counts nothing."""
    others = (ranks - 1) / ranks
    match operation:
        case "send":
            return nbytes(args[0])
        case "allreduce_" | "allreduce_coalesced_":
            return 2 * others * nbytes(args[0])
        case "_allgather_base_" | "allgather_" | "allgather_into_tensor_coalesced_":
            return others * nbytes(args[0])
        case "_reduce_scatter_base_" | "reduce_scatter_" | "reduce_scatter_tensor_coalesced_":
            return others * nbytes(args[1])
        case "alltoall_base_":
            tensor, splits = args[1], args[4]
            if not splits:
                return others * nbytes(tensor)
            return nbytes(tensor) * (1 - splits[rank] / max(1, sum(splits)))
    return 0.0


def nbytes(tensors: Any) -> int:
    """Of a tensor, or of all in nested lists."""
    return tensors.nbytes if torch.is_tensor(tensors) else sum(map(nbytes, tensors))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_anyway(model: mcore.MegatronModel, batches: Sequence[MicroBatch]) -> set[int]:
    """Storages of weights, gradients and micro-batches."""
    tensors = [tensor for stage in model.stages for tensor in (*stage.parameters(), *stage.buffers())]
    tensors += [parameter.main_grad for parameter in tensors if hasattr(parameter, "main_grad")]
    tensors += [value for batch in batches for value in vars(batch).values() if torch.is_tensor(value)]
    return {storage(tensor) for tensor in tensors}


def weights_of(model: mcore.MegatronModel) -> int:
    """Each storage once: a distributed optimizer keeps parameters in buffers."""
    found = {storage(p): p.untyped_storage().nbytes() for chunk in model.chunks for p in chunk.parameters()}
    return sum(found.values())


def gradients_of(model: mcore.MegatronModel) -> int:
    chunks: Any = model.chunks
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return sum(buffer.grad_data.nbytes for buffer in buffers)


def optimizer_of(policy: Trainable) -> int:
    """Moments, and the fp32 weights where the model's are not; not the step counters."""
    parts: Any = chained(policy.optimizer)
    adams = [part.optimizer for part in parts if part.optimizer is not None]
    parameters = {storage(p) for chunk in policy.model.chunks for p in chunk.parameters()}
    masters = [p for adam in adams for group in adam.param_groups for p in group["params"]]
    state = [
        t for adam in adams for entry in adam.state.values() for name, t in entry.items() if name != "step"
    ]
    return sum(t.nbytes for t in state) + sum(p.nbytes for p in masters if storage(p) not in parameters)
