"""`mtroll eval`: evaluation of a model on prompt files."""
