"""The only room that knows there is no GPU: what megatron-core needs to run on CPU tensors with gloo."""
