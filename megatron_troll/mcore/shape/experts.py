"""The keys of experts."""

from dataclasses import replace

from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape


def with_experts(fields: Fields, shape: ModelShape, experts: int, *, norm_topk: bool) -> ModelShape:
    """`shape` with `experts` experts in every layer. `norm_topk`: what an absent norm_topk_prob means."""
    chosen, norm_topk = fields.size("num_experts_per_tok"), fields.flag("norm_topk_prob", norm_topk)
    if (also := fields.size("num_local_experts", experts)) != experts:
        raise fields.error(f"num_local_experts is {also}, num_experts {experts}: give one")
    if chosen > experts:
        raise fields.error(f"num_experts_per_tok is {chosen}, and there are {experts} experts")
    if chosen == 1 and norm_topk:
        raise fields.error(
            "num_experts_per_tok 1 with norm_topk_prob true is not supported: the weight of the only expert "
            "is always 1, so that the router cannot learn"
        )
    return replace(
        shape,
        experts=experts,
        experts_per_token=chosen,
        expert_ffn=fields.size("moe_intermediate_size"),
        norm_topk=norm_topk,
    )
