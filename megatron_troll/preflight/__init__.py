"""Checks that the nodes of an allocation can run a configuration, made on each node before training."""
