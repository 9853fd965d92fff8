"""Mark which weights are matrices for Muon, and which state a data-parallel rank keeps of them.

Megatron orthogonalises a weight as one matrix, or as several if attributes describe how its rows are split.
It sets them for the attention's query, key and value; this module sets them for other weights. Under tensor
parallelism the whole matrix is gathered first, so an update does not depend on the layout.
"""

from typing import Any

from megatron.core.optimizer.layer_wise_optimizer import tag_params_for_buffer_routing
from torch import nn

from megatron_troll.mcore.gated_delta_net import GatedDeltaNet


def mark_matrices(chunk: nn.Module, *, sharded: bool) -> None:
    """Mark the parameters of `chunk` before its buffers are laid out: how fused weights split into matrices,
    and which weights are not matrices. `sharded`: one data-parallel rank keeps the state of each matrix."""
    for module in chunk.modules():
        if isinstance(module, GatedDeltaNet):
            projection: Any = module.in_proj
            _split(projection.weight, module.widths.projected)
    config: Any = chunk.config
    for name, parameter in chunk.named_parameters():
        rows = parameter.shape[0]
        if "linear_fc1.weight" in name and config.gated_linear_unit:
            _split(parameter, (rows // 2, rows // 2))
        elif parameter.dim() == 2 and rows == 1:
            # A vector stored as a row: the gate of a shared expert, a value head.
            mark_as_none(parameter)
    if sharded:
        tag_params_for_buffer_routing([chunk])


def mark_as_none(parameter: Any) -> None:
    """Mark `parameter` as not a matrix for Muon. Megatron's flag is named after other weights."""
    parameter.is_embedding_or_output_parameter = True


def _split(parameter: Any, rows: tuple[int, ...]) -> None:
    """Mark `parameter` as a stack of matrices, with this rank's `rows` of each. Megatron's attribute is named
    after the first weight that used it."""
    parameter.is_qkv = True
    parameter.qkv_split_shapes = list(rows)
