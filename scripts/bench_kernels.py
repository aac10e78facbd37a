"""Every kernel beside its peers, in turns and in one run, with the share of the machine's roofline that it reaches.

    python scripts/bench_kernels.py                            # all families; about 15 minutes on 2 cores
    python scripts/bench_kernels.py --families attention --filter "flash .* bfloat16"

Families are the modules of scripts/kernel_bench. Times are medians over interleaved rounds; a ratio is the peer's time
over ours, round by round, so above 1 we are faster. The share is the larger of operations / measured rate and bytes /
measured bandwidth, over our time. A peer that is not installed or fails is said and left out.

Writes scripts/results/bench_kernels-<device>.json and prints a table; a run of some cases replaces their rows and keeps
the others. The peers torch and tokamax are used where installed (the `peers` extra).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import kernel_bench
from kernel_bench.case import Case

from jaxinfer import measure

ROOT = Path(__file__).parent.parent

COLUMNS = ("case", "ours_ms", "share", "bound_by", "peer", "peer_ms", "ratio", "target", "met")


def families() -> list[str]:
    """The modules of scripts/kernel_bench that hold cases."""
    names = [module.name for module in pkgutil.iter_modules(kernel_bench.__path__)]
    return sorted(name for name in names if name != "case")


def selected(names: list[str], pattern: str) -> Iterator[Case]:
    """The families' cases whose name `pattern` finds."""
    for name in names:
        module = importlib.import_module(f"kernel_bench.{name}")
        for case in module.cases():
            if re.search(pattern, case.name):
                yield case


@functools.cache
def rate(dtype: str) -> float:
    """Operations a second of a product of `dtype`; of float32 where the word is no dtype that jax multiplies here."""
    try:
        return measure.matmul_rate(jnp.dtype(dtype))
    except (TypeError, ValueError) as error:
        print(f"  no rate of {dtype} ({error}); the share is against float32's")
        return measure.matmul_rate(jnp.float32)


def working(case: Case) -> dict[str, Any]:
    """The case's runs without the peers that fail; ours must not."""
    ours, *peers = case.runs
    runs = {ours: case.runs[ours]}
    for peer in peers:
        try:
            case.runs[peer]()
            runs[peer] = case.runs[peer]
        except Exception as error:  # a peer's own failure must not end the benchmark
            print(f"  {peer}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    return runs


def run(case: Case, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One result: our time, its share of the roofline, and each peer's time, ratio and target."""
    runs = working(case)
    timings = measure.interleaved(runs, rounds=rounds)
    ours, *peers = runs
    share = measure.roofline(case.flops, case.bytes, timings[ours].median, measure.Limits(bandwidth, rate(case.dtype)))
    row = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "direction": case.direction,
        "form": ours,
        "flops": case.flops,
        "bytes": case.bytes,
        "share": share.share,
        "bound_by": share.bound_by,
        "ours": timings[ours].row(),
        "peers": {
            peer: timings[peer].row() | against(timings[peer], timings[ours], case.targets.get(peer)) for peer in peers
        },
    }
    absent = sorted(set(case.targets) - set(peers))
    return row | ({"targets_not_measured": absent} if absent else {})


def against(peer: measure.Timing, ours: measure.Timing, target: float | None) -> dict[str, Any]:
    """The ratio of peer's time to ours, and whether it reaches the target, where there is one."""
    ratio = measure.speedup(peer, ours)
    reached = {} if target is None else {"target": target, "met": ratio.median >= target}
    return {"ratio": ratio.median, "ratio_q25": ratio.low, "ratio_q75": ratio.high} | reached


def table_rows(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A line of the table for each peer, and one where there is none."""
    head = {
        "case": " ".join(row[key] for key in ("op", "shape", "dtype", "direction")),
        "ours_ms": 1e3 * row["ours"]["median_s"],
        "share": row["share"],
        "bound_by": row["bound_by"],
    }
    for peer, result in row["peers"].items():
        cells = {"peer": peer, "peer_ms": 1e3 * result["median_s"], "ratio": result["ratio"]}
        if "target" in result:
            cells |= {"target": result["target"], "met": "met" if result["met"] else "MISSED"}
        yield head | cells
    if not row["peers"]:
        yield head


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in ("op", "shape", "dtype", "direction"))


def kept(path: Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run that this one did not measure."""
    if not path.exists():
        return []
    measured = {key_of(row) for row in new}
    return [row for row in json.loads(path.read_text())["rows"] if key_of(row) not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(families()), help="comma-separated modules of kernel_bench")
    parser.add_argument("--filter", default="", help="regular expression that a case's name must contain")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--results", default=str(ROOT / "scripts/results"), help="folder of the results file")
    options = parser.parse_args()
    bandwidth = measure.copy_bandwidth()
    results = measure.Results("bench_kernels", options.results, settings={"rounds": options.rounds})
    commit = measure.machine()["commit"]
    rows = []
    for case in selected(options.families.split(","), options.filter):
        print(case.name, file=sys.stderr)
        row = run(case, options.rounds, bandwidth)
        rows.append(row | {"bandwidth": bandwidth, "rate": rate(case.dtype), "commit": commit})
    if not rows:
        raise SystemExit(f"no case matches --filter {options.filter!r} in {options.families}")
    print(measure.text_table([line for row in rows for line in table_rows(row)], COLUMNS))
    for row in sorted(kept(results.path, rows) + rows, key=key_of):
        results.add(**row)
    print(f"written: {results.save()}")


if __name__ == "__main__":
    main()
