"""Checkpoints of one format from those of the other: Hugging Face and Megatron."""
