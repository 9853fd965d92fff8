"""A run: its parts, its state, and the rollouts it waits for."""
