"""A model and its optimizer as Megatron's sharded tensors, under names that do not depend on the layout.

`<model>.decoder.layers...` are the weights, `<model>.optimizer.state.{param,exp_avg,exp_avg_sq}.<weight>` the
fp32 masters and Adam's moments (`momentum_buffer` for Muon's matrices), in the shape of the weight, whichever
optimizer holds them. The rest of the optimizer's state is two counters (`counters`): hyperparameters come
from the config of the run.
"""

import base64
import json
import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import (
    add_prefix_for_sharding,
    extract_sharded_tensors_and_factories,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.optimizer import Trainable, chained, layer_wise
from megatron_troll.mcore.parallel import inside

MASTER, MOMENTS, MUON = "param", ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)

State = dict[Any, Any]
Whole = dict[nn.Parameter, dict[str, Tensor]]


def sharded(name: str, trained: Trainable, *, loading: bool) -> State:
    """{"model0": .., "model1": .. (pipeline chunks), "optimizer": one entry per Megatron optimizer of
    which this rank writes or reads a part; left out if there is none}.

    For saving, gathers the distributed optimizer's shards on the first data-parallel rank, which then holds
    3 fp32 copies of its model shard on the host, and blocks; for loading, every rank allocates that much.
    """
    for part in chained(trained.optimizer):
        _allocate(part)
    with inside(trained.model.groups):
        chunks = _chunks(trained.model)
        # The optimizer's names are built from those of the weights, so the prefix is added once, at the end.
        parts = [_sharded_part(part, trained, chunks, loading) for part in chained(trained.optimizer)]
    # Megatron warns if the states of two ranks differ, even by an empty dict.
    optimizer = {str(i): part for i, part in enumerate(parts) if part}
    state = {**chunks, **({"optimizer": optimizer} if optimizer else {})}
    add_prefix_for_sharding(state, f"{name}.")
    return state


def weights(name: str, model: MegatronModel) -> State:
    """The part of `sharded` with the weights, without the optimizer."""
    with inside(model.groups):
        chunks = _chunks(model)
    add_prefix_for_sharding(chunks, f"{name}.")
    return chunks


@torch.no_grad()
def restore(trained: Trainable, loaded: State, counters: dict[str, int]) -> None:
    """Copy the state that Megatron loaded for `sharded` into model and optimizer, and set the counters."""
    for i, stage in enumerate(trained.model.stages):
        result = stage.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        missing += result.unexpected_keys
        assert not missing, missing
    for i, part in enumerate(chained(trained.optimizer)):
        _restore_part(part, trained, loaded["optimizer"].get(str(i), {}))
        _set_steps(part, counters["optimizer_steps"])
    trained.schedule.num_steps = counters["schedule_steps"]
    trained.schedule.step(0)


def counters(trained: Trainable) -> dict[str, int]:
    """Optimizer steps taken (Adam's bias correction) and the schedule's position."""
    taken = [_steps_taken(part) for part in chained(trained.optimizer)]
    return {"optimizer_steps": max(taken, default=0), "schedule_steps": trained.schedule.num_steps}


def algorithm(trained: Trainable) -> str:
    """`optimizer.name` of the run, which determines what state there is."""
    return trained.optimizer.config.optimizer.replace("adam", "adamw")


def first_difference(state: State, saved: State) -> str | None:
    """Describe the first weight on this rank that the checkpoint's metadata lacks or has in another global
    shape; None if there is none."""
    tensors, _ = extract_sharded_tensors_and_factories(state)
    apply_factories(tensors)
    for tensor in nested_values(tensors):
        ours, theirs = tensor.global_shape, saved.get(tensor.key)
        if theirs is None:
            return f"{tensor.key} is not in the checkpoint"
        if tuple(ours) != tuple(theirs.global_shape):
            return f"{tensor.key} is {tuple(theirs.global_shape)} there and {tuple(ours)} here"
    return None


def _chunks(model: MegatronModel) -> State:
    return {
        f"model{i}": _without_empty_objects(stage.sharded_state_dict())
        for i, stage in enumerate(model.stages)
    }


def _without_empty_objects(state: State) -> State:
    """Drop objects that are None: Megatron's own linear layers add one `_extra_state` each, which only
    Transformer Engine fills, for FP8; as pickled objects they would outnumber the tensors."""
    return {
        key: value
        for key, value in state.items()
        if not (isinstance(value, ShardedObject) and value.data is None)
    }


def _parameters(trained: Trainable) -> Iterator[nn.Parameter]:
    for stage in trained.model.stages:
        yield from stage.parameters()


def _allocate(part: MegatronOptimizer) -> None:
    """Create Adam's moments or Muon's momentum if no step has been taken yet, without changing weights."""
    adam = part.optimizer
    if isinstance(adam, OrthogonalizedOptimizer):
        for group in adam.param_groups:
            adam._init_group(group, skip_non_grad_params=False)
        return
    if adam.state:
        return
    # The precision-aware optimizer reads `decoupled_grad`, whose dtype may differ from the parameter's.
    gradient = "decoupled_grad" if part.config.use_precision_aware_optimizer else "grad"
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.numel():
                setattr(parameter, gradient, torch.zeros_like(parameter))
    adam.step()
    adam.zero_grad()
    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate
    _set_steps(part, 0)


def _sharded_part(part: MegatronOptimizer, trained: Trainable, chunks: State, loading: bool) -> State:
    """{index of the parameter: its state} for the parameters whose whole state this rank writes or reads."""
    tensors, _ = extract_sharded_tensors_and_factories(chunks)
    weights = {id(weight.data): weight for weight in nested_values(tensors)}
    whole = _gathered(part, loading) if isinstance(part, DistributedOptimizer) else _plain(part, trained)
    state = {
        i: {
            key: make_sharded_optimizer_tensor(weights[id(parameter)], tensor, f"optimizer.state.{key}")
            for key, tensor in whole[parameter].items()
        }
        for i, parameter in enumerate(_parameters(trained))
        if parameter in whole
    }
    if _has_owners(part, trained):
        for tensor in nested_values(state):
            # Only one data-parallel rank holds this state, so that rank must write it, whichever it is.
            tensor.replica_id = (*tensor.replica_id[:2], 0)
    return state


def _has_owners(part: MegatronOptimizer, trained: Trainable) -> bool:
    """Whether one data-parallel rank holds the whole state of each parameter of `part`."""
    return any(part in chained(whole) for whole in layer_wise(trained.optimizer))


def _plain(part: MegatronOptimizer, trained: Trainable) -> Whole:
    """parameter -> its state: the fp32 master (the parameter itself if that is fp32), and the moments or
    Muon's momentum."""
    mains = {parameter: getattr(parameter, "main_param", parameter) for parameter in _parameters(trained)}
    state = part.optimizer.state
    return {
        parameter: {
            MASTER: main,
            **{key: value for key, value in state[main].items() if key in (*MOMENTS, *MUON)},
        }
        for parameter, main in mains.items()
        if main in state
    }


def _gathered(part: DistributedOptimizer, loading: bool) -> Whole:
    """parameter -> its whole state in fp32 on the host: gathered to the first data-parallel rank for saving
    ({} on the others), zeros on every rank for loading."""
    buffers: Any = part.get_parameter_state_dp_zero(
        use_gloo_comm=False, empty_data=loading, return_on_all_ranks=loading
    )
    if buffers is None:
        return {}
    whole = {}
    for i, buffer in enumerate(part.buffers):
        (gathered,) = buffers[i].values()
        # The gathered buckets are concatenated without their padding; Megatron's own code for the next step
        # (sharded_param_state_fully_reshardable) ignores that, and is wrong from the second bucket on.
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            first = starts[bucket] + start - buffer.buckets[bucket].offset
            place = slice(first, first + end - start)
            whole[parameter] = {key: gathered[key][place].view(parameter.shape) for key in (MASTER, *MOMENTS)}
    return whole


def _restore_part(part: MegatronOptimizer, trained: Trainable, loaded: State) -> None:
    if isinstance(part, DistributedOptimizer):
        _restore_shards(part, trained, loaded)
        return
    held = _plain(part, trained)
    for i, parameter in enumerate(_parameters(trained)):
        for key, tensor in held.get(parameter, {}).items():
            tensor.copy_(loaded[i][key])


def _restore_shards(part: DistributedOptimizer, trained: Trainable, loaded: State) -> None:
    """Set the flat slices of the state that this rank owns, in the dtype and on the device in which the
    optimizer keeps them."""
    for i, parameter in enumerate(_parameters(trained)):
        if parameter not in part.model_param_group_index_map:
            continue
        owned = part._get_model_param_range_map(parameter)["param"]
        shard = {
            key: loaded[i][key].reshape(-1)[owned.start : owned.end].to(parameter.device)
            for key in (MASTER, *MOMENTS)
        }
        held = part._get_main_param_and_optimizer_states(parameter)
        others = {key: value for key, value in held.items() if key not in shard}
        part._set_main_param_and_optimizer_states(parameter, shard | others)
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        part.optimizer._sync_hdo_state_to_sub_optimizers()


def _adams(part: MegatronOptimizer) -> list[Any]:
    """The torch optimizers inside `part`: one, or one for each device that holds a part of the state."""
    optimizer: Any = part.optimizer
    return optimizer.sub_optimizers if isinstance(optimizer, HybridDeviceOptimizer) else [optimizer]


def _steps_taken(part: MegatronOptimizer) -> int:
    """Optimizer steps taken: torch's AdamW counts them per parameter, fused optimizers per group."""
    adams = _adams(part)
    counts = [state["step"] for adam in adams for state in adam.state.values() if "step" in state]
    counts += [group["step"] for adam in adams for group in adam.param_groups if "step" in group]
    return int(max(counts, default=0))


def _set_steps(part: MegatronOptimizer, steps: int) -> None:
    """Set the step counters. torch increments the counter of each parameter in place, so none is shared."""
    if isinstance(part.optimizer, OrthogonalizedOptimizer):
        return  # it counts no steps
    for adam in _adams(part):
        fused = any("step" in group for group in adam.param_groups)
        for group in adam.param_groups:
            if fused:
                group["step"] = steps
                continue
            for parameter in group["params"]:
                if parameter in adam.state:
                    adam.state[parameter]["step"] = torch.tensor(float(steps))


def captured_rng() -> str:
    """The states of all random generators of this process, as JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }
    return json.dumps(state)


def restore_rng(text: str) -> None:
    """Restore the states that `captured_rng` returned."""
    state = json.loads(text)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
