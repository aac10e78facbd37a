"""What a family of kernels hands to scripts/check_gpu.py: a kernel, its oracle, and its XLA form to time it beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class GpuCase:
    """One kernel at one shape. `ours(*arguments)` and `xla(*arguments)` are traceable; `oracle()` is numpy in float64.

    `tolerance`: of the largest error over the oracle's largest magnitude, for each array of the result.
    """

    name: str  # "flash 1x8x2048x64 causal bfloat16 forward+backward"
    dtype: str  # what is multiplied
    arguments: tuple[Any, ...]
    ours: Callable[..., Any]
    xla: Callable[..., Any]
    oracle: Callable[[], Any]
    tolerance: float
    flops: float
    bytes: float
