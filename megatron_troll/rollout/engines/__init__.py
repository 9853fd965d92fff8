"""Engines, found by file name; each file defines one subclass of `Engine`."""
