"""Time to result: how long training takes to reach a target, and how methods compare over several workloads.

Dahl et al. 2023, Benchmarking Neural Network Training Algorithms (AlgoPerf; arXiv:2306.07179). The time is that of the
updates alone, as `train/loop.py` logs it: evaluation and checkpoints stop the clock. A run that never reaches the
target counts as infinite. With external tuning a method's time is the median over studies of the best trial in each;
methods are ranked by the area under their performance profile, from the best method's time to four times it.

Stability: experimental.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.errors import InputError

LARGEST_RATIO = 4.0


def time_to_result(
    rows: Sequence[Mapping[str, Any]], name: str, target: float, *, larger: bool = False, most: float = math.inf
) -> float:
    """Seconds of training until the evaluated value `name` first reached `target`; infinity where it never did.

    `rows`: a run's metrics (`train.metrics.read`): steps with `total_seconds`, evaluations between them. `larger`: the
    value must rise to the target (accuracy), not fall to it (loss). `most`: seconds after which nothing counts.
    Raises InputError where no evaluation has the value.
    """
    seconds = {row["step"]: row["total_seconds"] for row in rows if "total_seconds" in row}
    found = [(row["step"], row["evaluation"]) for row in rows if name in row.get("evaluation", {})]
    if not found:
        known = sorted({key for row in rows for key in row.get("evaluation", {})})
        raise InputError(f"name: got {name!r}, the run evaluated {', '.join(known) or 'nothing'}")
    for step, values in found:
        reached = values[name] >= target if larger else values[name] <= target
        if reached and seconds.get(step, math.inf) <= most:
            return seconds[step]
    return math.inf


def of_studies(times: Sequence[Sequence[float]]) -> float:
    """The median over studies of the smallest time of each study's trials; infinite trials take part."""
    if not times or not all(times):
        raise InputError(f"times: got {[len(study) for study in times]} trials a study, accepts at least one in each")
    return statistics.median(min(study) for study in times)


def profile(times: Mapping[str, Mapping[str, float]], ratio: float) -> dict[str, float]:
    """For each method (`{method: {workload: seconds}}`) the share of workloads in which its time is at most `ratio`
    times the best method's. A workload that no method finishes counts for none."""
    ratios = _ratios(times)
    return {method: sum(r <= ratio for r in found) / len(found) for method, found in ratios.items()}


def scores(times: Mapping[str, Mapping[str, float]], *, largest: float = LARGEST_RATIO) -> dict[str, float]:
    """The mean height of each method's profile between ratio 1 and `largest`: 1 for the best everywhere, 0 at worst."""
    if largest <= 1:
        raise InputError(f"largest: got {largest}, accepts more than 1")
    width = largest - 1
    # The profile is a staircase: a workload at ratio r adds its step from r on.
    return {
        method: sum(max(0.0, largest - r) for r in found) / width / len(found)
        for method, found in _ratios(times).items()
    }


def _ratios(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    workloads = sorted({workload for found in times.values() for workload in found})
    for method, found in times.items():
        if missing := sorted(set(workloads) - set(found)):
            raise InputError(f"times: {method} has none for {', '.join(missing)}; say infinity where it did not finish")
    best = {workload: min(found[workload] for found in times.values()) for workload in workloads}
    return {
        method: [found[w] / best[w] if math.isfinite(found[w]) else math.inf for w in workloads]
        for method, found in times.items()
    }
