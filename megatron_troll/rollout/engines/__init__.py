"""Engines, found by file name; each file defines one class with the methods of `Engine`."""
