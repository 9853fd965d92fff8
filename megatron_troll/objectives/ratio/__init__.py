"""Slot `ratio`: how a token or response is weighed against the old policy. One method a file, by name."""
