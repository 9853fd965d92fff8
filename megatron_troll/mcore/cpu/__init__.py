"""Support for megatron-core on CPU tensors with gloo; only parallel.py imports it."""
