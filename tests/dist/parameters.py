"""The parameters of a model on one rank, and what was accumulated for them."""

from torch import Tensor, nn

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.table import Entry


def parameters_by_name(model: MegatronModel) -> dict[str, nn.Parameter]:
    """Bare name -> parameter of this rank; the chunk number in front when there are several."""
    named = {}
    for i, stage in enumerate(model.stages):
        prefix = f"{i}." if len(model.chunks) > 1 else ""
        named.update({prefix + name: parameter for name, parameter in stage.named_parameters()})
    return named


def trained_parameters(model: MegatronModel) -> list[nn.Parameter]:
    return [parameter for parameter in parameters_by_name(model).values() if parameter.requires_grad]


def constants_of(shape: ModelShape) -> set[str]:
    """The tensors of a checkpoint that are not trained."""
    places = table_of(shape).places()
    return {name for place in places if not place.entry.trained for name in place.names}


def main_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient that data parallelism accumulates (`main_grad`, fp32)."""
    gradient = getattr(parameter, "main_grad", None)
    assert isinstance(gradient, Tensor)
    return gradient


def unshard(entry: Entry, shards: list[Tensor]) -> tuple[Tensor, ...]:
    """The parameters of all shards, in rank order, as Hugging Face's tensors."""
    return entry.from_parts(entry.join(shards))
