"""The division of one model over the ranks of a world: sizes of groups, layers of each pipeline stage."""

from dataclasses import dataclass

from megatron_troll.config import Layout


@dataclass(frozen=True)
class Ranks:
    """`world` ranks in `layout`, numbered in Megatron's order: tp (varies fastest), cp, ep, dp, pp."""

    layout: Layout
    world: int

    @property
    def dp(self) -> int:
        return self.world // (self.layout.tp * self.layout.pp * self.layout.cp)

    @property
    def dp_cp(self) -> int:
        """Number of ranks over which gradients of dense parameters are summed."""
        return self.dp * self.layout.cp

    @property
    def expert_dp(self) -> int:
        """Number of ranks over which gradients of an expert's parameters are summed."""
        return self.world // (self.layout.etp * self.layout.ep * self.layout.pp)

    @property
    def chunks(self) -> int:
        """Number of model chunks on one rank: above 1 if the pipeline is interleaved."""
        return self.layout.vpp or 1

    def stage(self, rank: int) -> int:
        return rank // (self.world // self.layout.pp)

    def dense_shard(self, rank: int) -> int:
        """Index of the part of the dense parameters' optimizer state that a rank keeps."""
        return rank // self.layout.tp % self.dp_cp

    def expert_shard(self, rank: int) -> int:
        return rank // (self.layout.etp * self.layout.ep) % self.expert_dp

    def layers(self, stage: int, chunk: int, layers: int) -> range:
        """The layers of one chunk of a stage, counted from 0, in a model of `layers` layers."""
        size = layers // (self.layout.pp * self.chunks)
        first = (chunk * self.layout.pp + stage) * size
        return range(first, first + size)

    def is_first(self, stage: int, chunk: int) -> bool:
        """Whether the chunk has the embedding."""
        return stage == 0 and chunk == 0

    def is_last(self, stage: int, chunk: int) -> bool:
        """Whether the chunk has the final norm and the head."""
        return stage == self.layout.pp - 1 and chunk == self.chunks - 1
