"""Whether the nodes of an allocation can run a configuration, asked on each of them before training."""
