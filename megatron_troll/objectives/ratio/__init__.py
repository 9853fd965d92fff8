"""Slot `ratio`: the ratio of a token or response to the old policy. One file per method, named after it."""
