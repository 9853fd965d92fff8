"""Slot `correction`: the weight for a rollout policy that is not the old one. One method a file, by name."""
