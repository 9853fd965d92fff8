"""The layouts that are refused. Megatron-Core is not imported: a bad request is answered in a moment."""

import importlib.util

import torch

from megatron_troll.config.tree import Layout
from megatron_troll.mcore.shape import ModelShape


def uses_te(spec: str) -> bool:
    """Whether `spec` (auto, local, te) means Transformer Engine here: auto takes it where CUDA and it exist.

    Raises ValueError when it is asked for and missing.
    """
    present = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if spec == "te" and not present:
        raise ValueError("models.*.spec=te needs CUDA and transformer_engine; use spec=local or spec=auto")
    return spec != "local" and present


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Raise ValueError naming the first size that cannot be cut as `layout` asks."""
    stages = layout.pp * (layout.vpp or 1)
    linear_heads = shape.linear.key_heads if shape.linear else 0
    rules = (
        (shape.heads, layout.tp, "attention heads", "tp"),
        (shape.kv_heads, layout.tp, "key-value heads", "tp"),
        (shape.ffn, layout.tp, "the feed-forward size", "tp"),
        (shape.layers, stages, "layers", "pp x vpp"),
        (shape.experts, layout.ep, "experts", "ep"),
        (shape.expert_ffn, layout.etp, "the expert feed-forward size", "etp"),
        (shape.shared_expert_ffn, layout.tp, "the shared expert's feed-forward size", "tp"),
        (linear_heads, layout.tp * layout.cp, "key heads of linear attention", "tp x cp"),
    )
    for size, parts, what, axis in rules:
        if size % parts:
            raise ValueError(f"{what} ({size}) cannot be divided by {axis} ({parts})")
    if layout.vpp is not None and (layout.pp < 2 or layout.vpp < 2):
        raise ValueError(
            f"vpp={layout.vpp} needs vpp >= 2 and pp >= 2 (pp is {layout.pp}); leave vpp out otherwise"
        )
    if not shape.experts and (layout.ep > 1 or layout.etp > 1):
        raise ValueError(f"ep={layout.ep} and etp={layout.etp} need a model with experts")
    if shape.experts and layout.tp > 1 and layout.ep == 1 and layout.etp == 1:
        raise ValueError(
            "tp > 1 with ep = 1 and etp = 1 gives wrong expert gradients in megatron-core 0.16.1 (they are "
            "not summed over the tensor-parallel ranks): set ep or etp above 1"
        )


def check_world(layout: Layout, world: int) -> None:
    """Raise ValueError unless `world` ranks can hold `layout`, for dense and for expert parameters."""
    dense = layout.tp * layout.pp * layout.cp
    expert = layout.etp * layout.ep * layout.pp
    for what, size in (("tp x pp x cp", dense), ("etp x ep x pp", expert)):
        if world % size:
            raise ValueError(
                f"layout {layout.model_dump(exclude_none=True)} needs a world that {what} = {size} divides; "
                f"this one has {world} ranks"
            )
