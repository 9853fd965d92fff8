"""A model that ends in one number per token: the critic."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_troll.mcore.model import HiddenStateModel, MegatronModel


class ValueModel(HiddenStateModel):
    """The body of a language model; its last stage has `value_weight` [h] in place of the LM head, the same
    on every tensor-parallel rank."""

    splits_head = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            del self.output_layer
            self.value_weight = nn.Parameter(torch.zeros(self.config.hidden_size))


def values(model: MegatronModel, hidden: Tensor) -> Tensor:
    """[N] float32 from final hidden states [N, h], on the last stage."""
    stage = model.stages[-1]
    assert isinstance(stage, ValueModel)
    return hidden.float() @ stage.value_weight.float()
