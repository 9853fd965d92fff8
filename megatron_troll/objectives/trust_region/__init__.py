"""Slot `trust_region`: how far an update may move the policy. One method a file, by name."""
