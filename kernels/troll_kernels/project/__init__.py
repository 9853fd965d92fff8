"""The TROLL projection onto a KL ball around the old policy (arXiv 2510.03817, eq. 3)."""

from troll_kernels.dispatch import by_device
from troll_kernels.project import ref
from troll_kernels.project.ref import Projection

project = by_device(ref.project)

__all__ = ["Projection", "project"]
