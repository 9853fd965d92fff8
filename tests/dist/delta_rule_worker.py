"""A rank on which flash-linear-attention seems to be installed and to run: its functions, in plain torch."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_troll.config import Model
from megatron_troll.mcore import delta_rule
from megatron_troll.mcore.model import build
from megatron_troll.mcore.shape import shape_of
from tests.dist.layouts_batch import Batch
from tests.dist.layouts_worker import Case, RankResult, run_cases
from tests.dist.tiny import NEXT, started


class FlashLinearAttention(ModuleType):
    """What the project calls of `fla.ops.gated_delta_rule`, with the shapes that the real one asks for."""

    def __init__(self) -> None:
        super().__init__("fla.ops.gated_delta_rule")
        self.lengths: list[int] = []

    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`cu_seqlens` [S + 1] int64: each sequence apart, through the rule."""
        assert q.dtype == k.dtype == v.dtype
        if cu_seqlens is None:
            output, state = delta_rule.chunked(q, k, v, g, beta, initial_state)
            return output, state if output_final_state else None
        assert len(v) == 1
        assert cu_seqlens.dtype == torch.int64
        assert cu_seqlens_cpu is not None
        assert torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        self.lengths += cu_seqlens.diff().tolist()
        parts = [slice(*each) for each in pairwise(cu_seqlens.tolist())]
        outputs = [delta_rule.chunked(*(x[:, at] for x in (q, k, v, g, beta)), None)[0] for at in parts]
        return torch.cat(outputs, 1), None

    fused_recurrent_gated_delta_rule = chunk_gated_delta_rule


@contextmanager
def installed(version: str = "0.6.0") -> Iterator[FlashLinearAttention]:
    """As fla-core of `version`, on a device that takes its kernels."""
    library = FlashLinearAttention()
    modules = {"fla": ModuleType("fla"), "fla.ops": ModuleType("fla.ops"), library.__name__: library}
    modules["fla"].__spec__ = ModuleSpec("fla", None)
    delta_rule._flash_linear_attention.cache_clear()
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(delta_rule, "linear_attention", return_value=version),
        mock.patch.object(delta_rule, "_takes_kernels", return_value=True),
    ):
        yield library
    delta_rule._flash_linear_attention.cache_clear()


def run_in_kernels(config: Model, batch: Batch, cases: Sequence[Case]) -> tuple[RankResult, list[int]]:
    """`run_cases`, and the lengths of the sequences that the kernels of variable lengths were given."""
    with installed() as library:
        result = run_cases(config, batch, cases)
    return result, library.lengths


def built_beside(version: str, config: Model) -> str:
    """What building a Qwen3-Next says where fla-core is of `version`."""
    with (
        started(config.layout) as groups,
        installed(version),
        pytest.raises(ValueError, match="linear-attention") as raised,
    ):
        build(config, shape_of(NEXT), groups)
    return str(raised.value)
