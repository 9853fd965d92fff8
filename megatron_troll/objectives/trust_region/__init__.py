"""Slot `trust_region`: how far an update may move the policy. One file per method, named after it."""
