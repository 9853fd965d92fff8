"""Check that a layout fits the model and the world. Fails fast, because Megatron-Core is not imported."""

import importlib.util
import math
import os
from dataclasses import dataclass

from megatron_troll.config import Config, ConfigError, Layout
from megatron_troll.mcore.shape import ModelShape


def uses_te(spec: str) -> bool:
    """Whether `spec` (auto, local, te) selects Transformer Engine: auto does if CUDA and the package exist.

    Raises ConfigError for te if either is missing.
    """
    import torch  # inside: it takes seconds, and a launcher needs none of it

    present = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if spec == "te" and not present:
        raise ConfigError("models.*.spec=te needs CUDA and transformer_engine; use spec=local or spec=auto")
    return spec != "local" and present


@dataclass(frozen=True)
class Cut:
    """A quantity `what` of `size` that `axis` of a layout divides into `parts` equal parts."""

    what: str
    size: int
    axis: str
    parts: int

    @property
    def fits(self) -> bool:
        return self.size % self.parts == 0


def cuts(shape: ModelShape, layout: Layout) -> list[Cut]:
    """Every quantity that a layout divides, including those on an axis of 1."""
    linear_heads = shape.linear.key_heads if shape.linear else 0
    everything = [
        Cut("attention heads", shape.heads, "tp", layout.tp),
        Cut("key-value heads", shape.kv_heads, "tp", layout.tp),
        Cut("the feed-forward size", shape.ffn, "tp", layout.tp),
        Cut("layers", shape.layers, "pp x vpp", layout.pp * (layout.vpp or 1)),
        Cut("experts", shape.experts, "ep", layout.ep),
        Cut("the expert feed-forward size", shape.expert_ffn, "etp", layout.etp),
        Cut("the shared expert's feed-forward size", shape.shared_expert_ffn, "tp", layout.tp),
        Cut("key heads of linear attention", linear_heads, "tp x cp", layout.tp * layout.cp),
    ]
    return [cut for cut in everything if cut.size]


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Raise ConfigError naming the first size that `layout` cannot divide, and which axis sizes could."""
    everything = cuts(shape, layout)
    for cut in everything:
        if not cut.fits:
            common = math.gcd(*(other.size for other in everything if other.axis == cut.axis))
            nearest = " or ".join(map(str, nearest_divisors(common, cut.parts)))
            raise ConfigError(
                f"{cut.what} ({cut.size}) cannot be divided by {cut.axis} ({cut.parts}); set {cut.axis} to "
                f"{nearest}"
            )
    if layout.vpp is not None and (layout.pp < 2 or layout.vpp < 2):
        raise ConfigError(
            f"vpp={layout.vpp} needs vpp >= 2 and pp >= 2 (pp is {layout.pp}); leave vpp out otherwise"
        )
    if not shape.experts and (layout.ep > 1 or layout.etp > 1):
        raise ConfigError(f"ep={layout.ep} and etp={layout.etp} need a model with experts; set both to 1")


def nearest_divisors(size: int, parts: int) -> list[int]:
    """The largest divisor of `size` below `parts` and the smallest above, if they exist."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below, above = [n for n in divisors if n < parts], [n for n in divisors if n > parts]
    return below[-1:] + above[:1]


def check_world(layout: Layout, world: int) -> None:
    """Raise ConfigError unless `world` ranks can hold `layout`, for dense and for expert parameters."""
    dense = layout.tp * layout.pp * layout.cp
    expert = layout.etp * layout.ep * layout.pp
    for what, size in (("tp x pp x cp", dense), ("etp x ep x pp", expert)):
        if world % size:
            whole = math.lcm(dense, expert)
            nearest = [n for n in (world // whole * whole, (world // whole + 1) * whole) if n]
            raise ConfigError(
                f"layout {layout.model_dump(exclude_none=True)} needs a world size divisible by "
                f"{what} = {size}; this one has {world} ranks; use {' or '.join(map(str, nearest))}"
            )


def smallest_world(layout: Layout) -> int:
    """The fewest ranks that hold `layout`."""
    return math.lcm(layout.tp * layout.pp * layout.cp, layout.etp * layout.ep * layout.pp)


def world_size(config: Config) -> int:
    """Number of ranks of this run: those that srun or torchrun started, or that `mtroll` will start."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return config.launch.ranks or smallest_world(config.policy.layout)
