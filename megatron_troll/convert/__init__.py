"""Conversion of checkpoints between the Hugging Face and the Megatron format."""
