"""Slot `kl`: the penalty that keeps the policy near the reference. One method a file, by name."""
