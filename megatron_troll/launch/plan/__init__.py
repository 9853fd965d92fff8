"""`mtroll plan`: memory and traffic of every rank, in bytes, before any rank is started (build.py). Nothing
is allocated, and no weights are read."""
