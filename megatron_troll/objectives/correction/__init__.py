"""Slot `correction`: weights if rollout and old policy differ. One file per method, named after it."""
