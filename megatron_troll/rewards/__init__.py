"""Rewards of answer texts: one verifier per file under verifiers/, plug-ins by import path."""
