"""Experiments of many runs: planned in one file, run to the end, summarised, compared."""
