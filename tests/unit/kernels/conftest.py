"""Triton kernels run here in Triton's interpreter, on CPU tensors: forward, backward and values are tested,
speed and anything that only a GPU compiler does are not. It has to be asked for before a kernel is
defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
