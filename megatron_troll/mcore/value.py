"""The critic: a model that outputs one number per token."""

from typing import Any

from torch import Tensor, nn

from megatron_troll.mcore.model import HiddenStateModel, MegatronModel


class ValueModel(HiddenStateModel):
    """The body of a language model; instead of the LM head its last stage has a value head [1, h], the same
    on every tensor-parallel rank."""

    splits_head = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = nn.Linear(self.config.hidden_size, 1, bias=False)


def values(model: MegatronModel, hidden: Tensor) -> Tensor:
    """Values [N] float32 from final hidden states [N, h], on the last stage."""
    return hidden.float() @ model.stages[-1].output_weight[0].float()
