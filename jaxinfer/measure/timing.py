"""Time several callables in one process, in turns, so that a change of the machine's pace meets all of them alike.

Stability: experimental.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round; `first` is the very first call, compilation included, kept apart."""

    seconds: tuple[float, ...]
    first: float
    repeats: int = 1  # calls in a sample

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def min(self) -> float:
        return min(self.seconds)

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    def row(self) -> dict[str, float | int]:
        """What a results file keeps of it."""
        return {
            "median_s": self.median,
            "min_s": self.min,
            "q25_s": self.quantile(0.25),
            "q75_s": self.quantile(0.75),
            "first_call_s": self.first,
            "rounds": len(self.seconds),
            "repeats": self.repeats,
        }


def interleaved(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    min_seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, Timing]:
    """Time each callable once a round, in an order that rotates, waiting for each call's arrays.

    `warmup` calls of each come first and are not counted. A sample is as many calls as last `min_seconds` by the last
    warm-up call's time, at least one, each waited for: use it for what is near the clock's resolution.
    Raises InputError without callables, rounds or warm-up.
    """
    if not callables or rounds < 1 or warmup < 1:
        raise InputError(
            f"interleaved needs a callable, a round and a warm-up call; got {list(callables)}, "
            f"rounds={rounds}, warmup={warmup}"
        )

    def sample(function: Callable[[], Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            wait(function())
        return (clock() - start) / calls

    warm = {name: [sample(function, 1) for _ in range(warmup)] for name, function in callables.items()}
    repeats = {name: max(1, math.ceil(min_seconds / max(last, 1e-9))) for name, (*_, last) in warm.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    names = list(callables)
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(sample(callables[name], repeats[name]))
    return {name: Timing(tuple(samples[name]), first=warm[name][0], repeats=repeats[name]) for name in names}


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio's median over the rounds and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def speedup(baseline: Timing, other: Timing) -> Ratio:
    """How many times faster `other` is, round by round: rounds of one `interleaved` call share the machine's pace.

    Raises InputError if the two have different numbers of rounds, and so do not come from one call.
    """
    if len(baseline.seconds) != len(other.seconds):
        raise InputError(f"speedup: {len(baseline.seconds)} and {len(other.seconds)} rounds do not come from one run")
    ratios = np.asarray(baseline.seconds) / np.asarray(other.seconds)
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))
