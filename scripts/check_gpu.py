"""Every GPU kernel on a real GPU: against a float64 oracle on fresh random inputs, with poisoned outputs, and timed.

    python scripts/check_gpu.py                        # a few minutes on one H100 or H200
    python scripts/check_gpu.py --ops flash --no-times

Inputs are drawn anew at each run (the seed is printed; --seed repeats it). Memory is filled with NaN before each call,
so that a kernel which leaves a part of its output unwritten cannot be lucky. A case passes if its largest error over
the largest magnitude of the oracle is within the case's tolerance. Times are medians of interleaved rounds, beside the
XLA form of the same op, with the share of the machine's measured limits.

Writes scripts/results/check_gpu-<device>.json and prints a table; exits with 1 if a case fails. Needs an NVIDIA Hopper
GPU and jax 0.11.2 or newer. Families register their cases in scripts/gpu_cases/<family>.py: `cases(seed)`, a generator
of `GpuCase`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_cases
import jax
import jax.numpy as jnp
import numpy as np
from gpu_cases.case import GpuCase

from jaxinfer import measure

ROOT = Path(__file__).parent.parent

COLUMNS = ("case", "worst_error", "tolerance", "passed", "ours_ms", "xla_ms", "ratio", "share", "bound_by")


def selected(names: list[str], seed: int, pattern: str) -> Iterator[GpuCase]:
    """The families' cases whose name `pattern` finds."""
    for name in names:
        module = importlib.import_module(f"gpu_cases.{name}")
        yield from (case for case in module.cases(seed) if re.search(pattern, case.name))


def families() -> list[str]:
    names = [module.name for module in pkgutil.iter_modules(gpu_cases.__path__)]
    return sorted(name for name in names if name != "case")


def poison(nbytes: int) -> None:
    """Leave NaNs in the memory that the next call's outputs will be put into."""
    blocks = [jnp.full((nbytes // 4 + 1,), jnp.nan, jnp.float32) for _ in range(3)]
    jax.block_until_ready(blocks)
    for block in blocks:
        block.delete()


def worst_error(got: Any, want: Any) -> float:
    """The largest error over the largest magnitude wanted, of all arrays; infinite where non-finite entries differ."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a).astype(np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        if a.shape != b.shape or not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(a[finite]).all():
            return float("inf")
        scale = np.abs(b[finite]).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(a[finite] - b[finite]).max(initial=0.0) / scale))
    return worst


def check(case: GpuCase, times: bool, rounds: int, bandwidth: float | None) -> dict[str, Any]:
    """One result row. A case that raises has failed, and says with what."""
    row: dict[str, Any] = {"case": case.name, "tolerance": case.tolerance}
    try:
        ours = jax.jit(case.ours)
        outputs = jax.eval_shape(ours, *case.arguments)
        poison(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(outputs)))
        error = worst_error(ours(*case.arguments), case.oracle())
        row |= {"worst_error": error if np.isfinite(error) else None, "passed": error <= case.tolerance}
        if times and bandwidth is not None:
            xla = jax.jit(case.xla)
            runs = {"ours": lambda: ours(*case.arguments), "xla": lambda: xla(*case.arguments)}
            timings = measure.interleaved(runs, rounds=rounds, min_seconds=0.01)
            limits = measure.Limits(bandwidth, measure.matmul_rate(jnp.dtype(case.dtype)))
            share = measure.roofline(case.flops, case.bytes, timings["ours"].median, limits)
            row |= {
                "ours_ms": 1e3 * timings["ours"].median,
                "xla_ms": 1e3 * timings["xla"].median,
                "ratio": measure.speedup(timings["xla"], timings["ours"]).median,
                "share": share.share,
                "bound_by": share.bound_by,
            }
    except Exception as error:  # one kernel's failure must not hide the others
        row |= {"passed": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--families", default=",".join(families()), help="comma-separated modules of gpu_cases")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--no-times", dest="times", action="store_false", help="check the numbers only")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"check_gpu needs an NVIDIA GPU, the default backend is {jax.default_backend()}")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    print(f"seed {seed}")
    bandwidth = measure.copy_bandwidth() if options.times else None
    results = measure.Results("check_gpu", ROOT / "scripts/results", settings={"seed": seed, "rounds": options.rounds})
    for case in selected(options.families.split(","), seed, options.ops):
        row = results.add(**check(case, options.times, options.rounds, bandwidth))
        print(row["case"], "passed" if row["passed"] else f"FAILED {row.get('error', row.get('worst_error'))}")
    print(measure.text_table(results.rows, COLUMNS))
    print(f"written: {results.save()}")
    if not results.rows or not all(row["passed"] for row in results.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
