"""A critic's weights: the body of a language model, and a value head that starts at 0."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_troll.weights.source import Source
from megatron_troll.weights.table import Entry, HFTensor, Table

VALUE_HEAD = "value_head.weight"
LM_HEAD = "lm_head.weight"
MEGATRON_HEAD = ("output_layer.weight",)


def value_table(table: Table, hidden: int) -> Table:
    """`table` of a language model with a value head [1, h] in place of the LM head."""
    body = [entry for entry in table.entries if entry.megatron != MEGATRON_HEAD]
    head = Entry((HFTensor(VALUE_HEAD, (1, hidden)),), MEGATRON_HEAD)
    return replace(table, entries=(*body, head))


@dataclass(frozen=True)
class ValueSource:
    """Initial weights of a critic from a language model, `model`: no LM head, zeros for the value head
    [1, h], so that every value starts at 0."""

    model: Source
    hidden: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        body = {name: shape for name, shape in self.model.shapes.items() if name != LM_HEAD}
        return {**body, VALUE_HEAD: (1, self.hidden)}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name == VALUE_HEAD else self.model.dtype(name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        return torch.zeros(1, self.hidden) if name == VALUE_HEAD else self.model.read(name, index)
