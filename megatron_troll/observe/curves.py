"""Figures of one curve over the steps of a run."""

from collections.abc import Sequence

import numpy as np


def jitter2(series: Sequence[float]) -> float | None:
    """mean |m_{t+2} - 2 m_{t+1} + m_t|, how unsteady a reward curve is (ALGORITHMS 4.3); None for fewer than
    three points."""
    if len(series) < 3:
        return None
    return float(np.abs(np.diff(np.asarray(series, dtype=np.float64), n=2)).mean())
