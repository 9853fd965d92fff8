"""No trust region: the plain importance-weighted policy gradient."""

from typing import ClassVar

from megatron_troll.objectives.slots import TrustRegion


class NoTrustRegion(TrustRegion):
    """score = r A."""

    family: ClassVar[str] = "unlimited"
