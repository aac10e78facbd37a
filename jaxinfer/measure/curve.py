"""Latency as a function of size, such as tokens a step: what decides how long a draft may be.

Stability: experimental.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import InputError
from jaxinfer.measure.timing import interleaved


@dataclasses.dataclass(frozen=True)
class LatencyCurve:
    """Median seconds at each size. Hashable and made of plain numbers, so that a job can freeze it in its manifest."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self):
        increasing = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.seconds) or not increasing or min(self.sizes) < 1:
            raise InputError(f"a latency curve needs increasing positive sizes, a time for each; got {self}")

    def __call__(self, size: float) -> float:
        """Seconds at a size: linear between the measured ones, and beyond the last along its last slope."""
        if size > self.sizes[-1] and len(self.sizes) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2])
            return self.seconds[-1] + max(slope, 0.0) * (size - self.sizes[-1])
        return float(np.interp(size, self.sizes, self.seconds))


def latency_curve(function: Callable[[int], Any], sizes: Sequence[int], **options: Any) -> LatencyCurve:
    """Median seconds of `function(size)`, the sizes interleaved; `options` are those of `interleaved`."""
    sizes = sorted(set(sizes))
    timings = interleaved({str(size): functools.partial(function, size) for size in sizes}, **options)
    return LatencyCurve(tuple(sizes), tuple(timings[str(size)].median for size in sizes))
