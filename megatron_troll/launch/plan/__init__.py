"""`mtroll plan`: what a configuration asks of every rank, in bytes, before any is started (build.py). Nothing
is allocated, no weights are read."""
