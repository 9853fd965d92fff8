"""Replacements for what SGLang's wheels expect from CUDA, on a machine without it. Import this module first;
spawned children import it again with the main module.

- PyPI's torchvision is built for CUDA. With a CPU build of torch its library does not load, and its Python
  part then fails to register fake kernels for two missing operators: they are declared here.
- `sgl_kernel` (next to this package) replaces the CUDA kernels.
- Returned expert routings are staged in page-locked memory, which needs CUDA: `unpin_host_memory`.
"""

import os

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

if torch.version.cuda is None:
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    _TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def unpin_host_memory() -> None:
    """Leave buffers that SGLang would page-lock pageable."""
    from sglang.srt.mem_cache.pool_host import common

    common._cuda_host_register = lambda *_args, **_kwargs: None
