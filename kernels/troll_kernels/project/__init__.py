"""The TROLL projection onto a KL ball around the old policy (arXiv 2510.03817, eq. 3)."""

from troll_kernels.project.ref import Projection, project

__all__ = ["Projection", "project"]
