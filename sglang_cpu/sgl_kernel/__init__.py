"""Stand-ins for SGLang's compiled kernels, of which PyPI has only the CUDA build. SGLang imports these names
on CPU too, for speculative decoding, which is not used here: calling one raises NotImplementedError."""

from collections.abc import Callable
from typing import NoReturn

__version__ = "0.4.10"

NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)


def _missing(name: str) -> Callable[..., NoReturn]:
    def call(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return call


globals().update({name: _missing(name) for name in NAMES})
