"""Slot `kl`: the penalty that keeps the policy near the reference. One file per method, named after it."""
