"""How a rollout batch becomes optimizer steps."""
