"""The training objective: pure tensor maths, one method per file, composed from slots."""

from megatron_troll.objectives.aggregation import token_weights
from megatron_troll.objectives.compose import compose, resolve
from megatron_troll.objectives.objective import Objective

__all__ = ["Objective", "compose", "resolve", "token_weights"]
