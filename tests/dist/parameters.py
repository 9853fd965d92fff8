"""The parameters of a model on one rank, and what was accumulated for them."""

from torch import Tensor, nn

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.weights.table import Entry


def parameters_by_name(model: MegatronModel) -> dict[str, nn.Parameter]:
    """Bare name -> parameter of this rank; the chunk number in front when there are several."""
    named = {}
    for i, stage in enumerate(model.stages):
        prefix = f"{i}." if len(model.chunks) > 1 else ""
        named.update({prefix + name: parameter for name, parameter in stage.named_parameters()})
    return named


def main_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient that data parallelism accumulates (`main_grad`, fp32)."""
    gradient = getattr(parameter, "main_grad", None)
    assert isinstance(gradient, Tensor)
    return gradient


def unshard(entry: Entry, shards: list[Tensor]) -> tuple[Tensor, ...]:
    """The parameters of all shards, in rank order, as Hugging Face's tensors."""
    return entry.from_parts(entry.join(shards))
