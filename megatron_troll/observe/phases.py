"""Time of each phase of a step, remaining time, and MFU."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

# Dense bf16 peaks in TFLOP/s from the vendors' data sheets; the first name found in the device name wins.
PEAK_TFLOPS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
)


class Phases:
    """Measures phases: `with phases("generation"):` adds to the seconds of that phase. The time of a nested
    phase is not counted in the outer one. `around` are entered with the phase name too (the watchdog, the
    progress panel); `synchronize` is called at both ends, so that work queued on a device is charged to the
    phase that queued it."""

    def __init__(
        self,
        *around: Callable[[str], AbstractContextManager[object]],
        synchronize: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._around = around
        self._synchronize = synchronize
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for listener in self._around:
                stack.enter_context(listener(name))
            self._synchronize()
            start = self._clock()
            self._inner.append(0.0)
            try:
                yield
                self._synchronize()
            finally:
                elapsed = self._clock() - start
                self._seconds[name] = self._seconds.get(name, 0.0) + elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

    def take(self) -> dict[str, float]:
        """`seconds/<phase>` since the last call, in order of first use."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


class Pace:
    """Estimates remaining seconds from the median of the last 20 steps, robust to a slow first step."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._recent: deque[float] = deque(maxlen=20)

    def eta(self, step: int, seconds: float) -> float:
        """Remaining seconds of the run, after `step` took `seconds`."""
        self._recent.append(seconds)
        return max(0, self._steps - step) * median(self._recent)


@dataclass(frozen=True)
class ModelCost:
    """Floating-point work per token.

    parameters  parameters a token passes through (for a MoE: shared ones and its top-k experts), LM head
                included, embedding excluded
    attention   layers x query heads x head dimension
    """

    parameters: int
    attention: int

    def flops(self, forward_tokens: float, trained_tokens: float, mean_context: float) -> float:
        """FLOPs. A forward token costs 2 per parameter plus causal attention over `mean_context` tokens of
        context on average; a trained token costs three times that (recomputation not counted)."""
        per_token = 2 * self.parameters + 4 * self.attention * mean_context
        return per_token * (forward_tokens + 3 * trained_tokens)


def peak_tflops(device_name: str | None, override: float | None) -> float | None:
    """Dense bf16 TFLOP/s of one device; `override` wins; None if the device is unknown."""
    if override is not None:
        return override
    return next((peak for name, peak in PEAK_TFLOPS if device_name and name in device_name), None)


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Share in [0, 1] of the devices' peak (`peak` TFLOP/s each) that `flops` in `seconds` reach."""
    return flops / (seconds * devices * peak * 1e12)
