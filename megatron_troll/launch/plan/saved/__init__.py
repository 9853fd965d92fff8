"""What autograd keeps for the backward pass of one micro-batch. For the local layers this is measured
(tests/dist/test_plan.py); for Transformer Engine's it is read from its sources."""
