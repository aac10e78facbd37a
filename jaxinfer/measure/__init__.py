"""Honest timing: interleaved medians, the machine's limits, latency curves and the roofline share.

    timings = measure.interleaved({"plain": plain, "fast": fast}, rounds=9)
    print(measure.speedup(timings["plain"], timings["fast"]))
    limits = measure.limits()
    print(measure.roofline(flops, nbytes, timings["fast"].median, limits).share)

Imports jax and numpy only, so that kernels and every benchmark can use it.

Stability: experimental.
"""

from jaxinfer.measure.curve import LatencyCurve, latency_curve
from jaxinfer.measure.host import Load, load, machine, quiet
from jaxinfer.measure.results import Results, text_table
from jaxinfer.measure.roof import Limits, Share, copy_bandwidth, limits, matmul_rate, roofline
from jaxinfer.measure.timing import Ratio, Timing, interleaved, speedup

__all__ = [
    "LatencyCurve",
    "Limits",
    "Load",
    "Ratio",
    "Results",
    "Share",
    "Timing",
    "copy_bandwidth",
    "interleaved",
    "latency_curve",
    "limits",
    "load",
    "machine",
    "matmul_rate",
    "quiet",
    "roofline",
    "speedup",
    "text_table",
]
