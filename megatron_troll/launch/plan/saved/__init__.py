"""Bytes that autograd keeps for the backward pass of one micro-batch. For the local layers they are checked
by measurement (tests/dist/test_plan.py); for Transformer Engine's they are derived from its source code."""
