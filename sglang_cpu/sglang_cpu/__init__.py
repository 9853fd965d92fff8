"""What SGLang's wheels expect of CUDA at import, on a machine that has none. Importing this module first is
all there is to it; spawned children import it again with the main module.

- PyPI's torchvision is built for CUDA. Beside a CPU build of torch its library does not load, and its Python
  part then fails to register fake kernels for two operators that are missing: they are declared here.
- `sgl_kernel` (beside this package) stands in for the CUDA kernels.
- Returned expert routings are staged in page-locked memory, which there is none of without CUDA.
"""

import os

import torch

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")

if torch.version.cuda is None:
    _TORCHVISION = torch.library.Library("torchvision", "DEF")
    _TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def unpin_host_memory() -> None:
    """Let buffers that SGLang would page-lock stay pageable."""
    from sglang.srt.mem_cache.pool_host import common

    common._cuda_host_register = lambda *_args, **_kwargs: None
