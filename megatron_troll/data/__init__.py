"""Prompt files, chat templates, tokenizers, and the demo task."""
