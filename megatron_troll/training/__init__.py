"""Optimizer steps on a rollout batch."""
