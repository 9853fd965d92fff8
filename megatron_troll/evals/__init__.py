"""`mtroll eval`: a model on prompt files, and what its samples say."""
