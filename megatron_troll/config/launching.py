"""Processes that `mtroll` starts itself, and the machine that `mtroll plan` fits a run to."""

from pydantic import Field

from megatron_troll.config.node import Node, NonNegative, Positive, PositiveFloat


class Launch(Node):
    """How many ranks `mtroll` starts by itself when nothing (srun, torchrun) has started it."""

    ranks: Positive | None = Field(
        default=None, description="default: the smallest world that holds the layouts"
    )
    threads: Positive | None = Field(default=None, description="CPU threads per rank; default: cores / ranks")
    device_gib: PositiveFloat = Field(
        default=139.0, description="memory of a GPU, for `mtroll plan`; default: an H200"
    )
    reserve_gib: NonNegative = Field(
        default=10.0, description="of it, left to CUDA, NCCL and fragmentation; `mtroll plan`"
    )
