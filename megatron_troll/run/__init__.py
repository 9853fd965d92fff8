"""A run: its parts, where it stands, the rollouts it waits for."""
