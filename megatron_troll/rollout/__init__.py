"""Who generates, and how a token is drawn."""

from megatron_troll.rollout.build import build

__all__ = ["build"]
