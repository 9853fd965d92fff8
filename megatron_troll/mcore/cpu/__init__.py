"""Support for megatron-core on CPU tensors with gloo; only parallel.py and the command line import it."""
