"""Trying an answer on a test in two processes, of which only the test's makes the verdict."""
