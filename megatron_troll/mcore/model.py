"""Build a Megatron model that returns its final hidden states, and forward one micro-batch through it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, override

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_troll.config import Model, Optimizer
from megatron_troll.mcore.delta_rule import implementation
from megatron_troll.mcore.dispatch import pad_dispatchers
from megatron_troll.mcore.layout import check_layout, uses_te
from megatron_troll.mcore.muon import mark_matrices
from megatron_troll.mcore.options import check_muon_layout, check_options
from megatron_troll.mcore.packing import packed_sequences
from megatron_troll.mcore.parallel import device, inside
from megatron_troll.mcore.rotary import inverse_frequencies
from megatron_troll.mcore.router import routers, routing
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.mcore.transformer_config import transformer_config
from megatron_troll.parallel.groups import ALONE, Groups
from megatron_troll.types import MicroBatch

# Megatron's default bucket size in parameters: BUCKET, or BUCKET_PER_RANK x ranks if that is larger.
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns the normed hidden states [s, b, h] (sharded over s under sequence
    parallelism); the LM head (head.py) reads its `output_weight`.

    splits_head  whether the head is split over the tensor-parallel ranks, so that their gradients of the
                 hidden states must be summed
    """

    splits_head = True

    @override
    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return super().forward(*inputs, output_processor=_hidden_states, **options)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the head on this rank, [V_padded / tp, h]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        weight = self.output_layer.weight
        assert weight is not None
        return weight


def _hidden_states(*, hidden_states: Tensor, **_: Any) -> Tensor:
    """Return the hidden states, which Megatron's last stage then outputs instead of logits."""
    return hidden_states


@dataclass(frozen=True)
class MegatronModel:
    """One model on this rank: its virtual pipeline chunks, wrapped for data parallelism if it is trained.
    `progress` is called after each forward of a chunk and for each tensor that is loaded or exported, so that
    a watchdog can distinguish a long phase from a hang."""

    shape: ModelShape
    config: TransformerConfig
    groups: Groups
    chunks: list[nn.Module]
    progress: Callable[[], object]

    @property
    def stages(self) -> list[HiddenStateModel]:
        """The chunks without their data-parallel and precision wrappers."""
        return [bare(chunk) for chunk in self.chunks]

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.train(mode)


def bare(chunk: nn.Module) -> HiddenStateModel:
    """`chunk` without its wrappers."""
    while not isinstance(chunk, HiddenStateModel):
        inner = chunk.module
        assert isinstance(inner, nn.Module)
        chunk = inner
    return chunk


def build(
    model: Model,
    shape: ModelShape,
    groups: Groups,
    *,
    trained: bool = True,
    kind: type[HiddenStateModel] = HiddenStateModel,
    progress: Callable[[], object] = lambda: None,
) -> MegatronModel:
    """Build the chunks of this rank, with uninitialised weights (weights/ fills them). See MegatronModel for
    `progress`.

    Raises ValueError for a layout into which the model cannot be divided.
    """
    check_layout(shape, model.layout)
    check_options(shape, model)
    if trained:
        check_muon_layout(shape, model, groups.world.size)
    config = transformer_config(model, shape)
    with inside(groups):
        chunks: list[nn.Module] = [
            _chunk(kind, model, shape, config, groups, vp_stage) for vp_stage in range(model.layout.vpp or 1)
        ]
        for router in routers(chunks):
            router.configure(model.moe)
        if config.bf16:
            chunks = [Float16Module(config, chunk) for chunk in chunks]
        if trained:
            chunks = _data_parallel(config, chunks, model.optimizer, groups)
    return MegatronModel(shape, config, groups, chunks, progress)


def _chunk(
    kind: type[HiddenStateModel],
    model: Model,
    shape: ModelShape,
    config: TransformerConfig,
    groups: Groups,
    vp_stage: int,
) -> HiddenStateModel:
    stage = vp_stage if model.layout.vpp else None
    start = get_transformer_layer_offset(config, vp_stage=stage, pp_rank=groups.pp.rank)
    count = get_num_layers_to_build(config, vp_stage=stage, pp_rank=groups.pp.rank)
    layers = shape.layer_types[start : start + count]
    if uses_te(model.spec):
        from megatron_troll.mcore.te_spec import block_spec
    else:
        from megatron_troll.mcore.local_spec import block_spec
    first = groups.is_first_stage and vp_stage == 0
    last = groups.is_last_stage and vp_stage == (model.layout.vpp or 1) - 1
    chunk = kind(
        config,
        block_spec(shape, layers),  # pyright: ignore[reportArgumentType]
        vocab_size=shape.padded_vocab(model.layout.tp),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
        vp_stage=stage,
    )
    chunk.rotary_pos_emb.inv_freq = inverse_frequencies(shape)
    pad_dispatchers(chunk)
    return chunk.to(device())


def _data_parallel(
    config: TransformerConfig, chunks: list[nn.Module], optimizer: Optimizer, groups: Groups
) -> list[nn.Module]:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
    )
    if optimizer.name == "muon":
        for chunk in chunks:
            mark_matrices(chunk, sharded=optimizer.distributed)
    wrapped = [
        DistributedDataParallel(
            config, settings, chunk, full_param_layout=_buffers(chunk, settings, optimizer, groups)
        )
        for chunk in chunks
    ]
    if optimizer.overlap_grad_reduce:
        # The schedule uses no_sync so that gradients are reduced only in the last micro-batch.
        unreduced = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = unreduced if len(unreduced) > 1 else unreduced[0]  # pyright: ignore[reportAttributeAccessIssue]
    return [*wrapped]


def _buffers(
    chunk: nn.Module, settings: DistributedDataParallelConfig, optimizer: Optimizer, groups: Groups
) -> FullParamLayout | None:
    """Layout of the parameters in the buffers along which the optimizer's state is sharded: by elements, or
    by whole matrices for Muon. None if the state is not sharded."""
    if not optimizer.distributed:
        return None
    kind = LayerWiseDistributedOptimizer if optimizer.name == "muon" else DistributedOptimizer
    # Same as Megatron: only the first stage divides its buffers into buckets, and only to overlap reduction.
    cut = optimizer.overlap_grad_reduce and groups.pp.rank == 0
    return kind.compute_full_param_layout(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad],
        (settings.bucket_size or max(BUCKET, BUCKET_PER_RANK * groups.dp.size)) if cut else None,
        groups.dp_cp.size,
        settings,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def forward(model: MegatronModel, chunk: nn.Module, batch: MicroBatch) -> Tensor:
    """Forward `batch` through one chunk: hidden states [s, b, h] for the next stage or, on the last stage,
    the final ones; this rank's slice under sequence parallelism. Routers replay `batch.experts`, if any."""
    packed = None
    if batch.cu_seqlens is not None:
        packed = packed_sequences(batch.cu_seqlens, batch.max_seqlen, model.groups.cp, batch.tree)
    with routing(chunk, batch.experts, _of_routers(model, batch.share)):
        hidden = chunk(
            batch.tokens,
            batch.positions,
            None,
            packed_seq_params=packed,
            padding_mask=_padding_of_stage(model, chunk, batch.padding),
        )
    model.progress()
    return hidden


def _of_routers(model: MegatronModel, share: Tensor) -> Tensor:
    """`MicroBatch.share` of the tokens that this rank's routers see, in their order [s, b], flat."""
    tp = model.groups.tp if model.config.sequence_parallel else ALONE
    return share.t().chunk(tp.size)[tp.rank].flatten()


def layer_remarks(model: MegatronModel) -> list[str]:
    """Messages to log once about how `model` runs on this machine."""
    if model.shape.linear is None:
        return []
    return [implementation(device(), model.config.params_dtype)]


def _padding_of_stage(model: MegatronModel, chunk: nn.Module, padding: Tensor) -> Tensor:
    """Padding mask for the stage of `chunk`. Under sequence parallelism Megatron shards the mask only on the
    first stage; later stages get their shard here."""
    if bare(chunk).pre_process or not model.config.sequence_parallel:
        return padding
    return padding.chunk(model.groups.tp.size, dim=1)[model.groups.tp.rank]


def select_hidden(model: MegatronModel, hidden: Tensor, index: Tensor) -> Tensor:
    """Hidden states [N, h] of the flattened [b * s] positions `index`, from the last stage's [s, b, h].

    Under sequence parallelism, gathers s over the tensor-parallel ranks; backward scatters the gradients,
    after summing them over these ranks if the head is split.
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden,
            tensor_parallel_output_grad=model.stages[-1].splits_head,
            group=model.groups.tp.handle,
        )
    return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])[index]
