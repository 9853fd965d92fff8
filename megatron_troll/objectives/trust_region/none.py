"""No trust region: the plain importance-weighted policy gradient."""

from megatron_troll.objectives.slots import TrustRegion


class NoTrustRegion(TrustRegion):
    """score = r A."""
