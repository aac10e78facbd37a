"""What a family of kernels hands to scripts/bench_kernels.py: one task, our way of doing it, and the peers' ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


@dataclasses.dataclass(frozen=True)
class Case:
    """One task at one shape; the shares of the roofline are taken against the rate of `dtype`, measured in that run.

    `runs` are compiled functions with their inputs bound, never constants of the program, that return arrays to wait
    for; the first is ours. `targets` holds the ratio peer time / our time that is asked for.
    """

    op: str  # "flash"
    shape: str  # "1x8x2048x64 causal"
    dtype: str  # "bfloat16": what is multiplied
    direction: str  # "forward" or "forward+backward"
    runs: Mapping[str, Callable[[], Any]]
    flops: float  # the least operations that the task needs
    bytes: float  # the least bytes that it must move
    targets: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"


def unavailable(reason: str) -> Callable[[], NoReturn]:
    """A peer that cannot run here; the benchmark prints `reason` and goes on without it."""

    def run() -> NoReturn:
        raise RuntimeError(reason)

    return run
