"""What the papers lead one to expect, beside what this run found: one line each, from the table alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def find(table: Sequence[Row], method: str, sampler: str, steps: int) -> Row | None:
    """The row of a method, its sampler and number of steps, if it was measured."""
    keys = (method, sampler, steps)
    return next((r for r in table if (r["method"], r["sampler"], r["steps"]) == keys), None)


def mean_flow(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """One step of MeanFlow against one of flow matching, in distance above the floor."""
    flow, mean = find(table, "flow matching", "euler", 1), find(table, "MeanFlow", "mean velocity", 1)
    if flow is None or mean is None:
        return None
    one, other = (r["frechet_distance"] - floor for r in (mean, flow))
    nearer = f"{other / one:.1f} times nearer" if one > 0 else "below the floor"
    distances = f"{mean['frechet_distance']:.2f} against {flow['frechet_distance']:.2f}"
    found = f"{nearer} ({distances}); recall {mean['recall']:.3f} against {flow['recall']:.3f}"
    return "MeanFlow in one step: 3 times nearer the floor than flow matching, recall no lower", found


def boss(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """BOSS against uniform grids at 2, 4 and 8 steps."""
    found = []
    for steps in (2, 4, 8):
        uniform, best = find(table, "flow matching", "euler", steps), find(table, "BOSS", "euler, best grid", steps)
        if uniform is not None and best is not None:
            found.append(f"{steps}: {best['frechet_distance']:.2f} against {uniform['frechet_distance']:.2f}")
    return ("BOSS below uniform grids at 2 to 8 steps", "; ".join(found)) if found else None


def blockwise(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """The feature residual against flow matching in 16 steps of Euler: distance and operations a sample."""
    flow, found = find(table, "flow matching", "euler", 16), []
    for steps in (8, 16):
        block = find(table, "blockwise", "feature residual", steps)
        if flow is not None and block is not None:
            found.append(f"{steps} steps: {block['frechet_distance']:.2f} for {block['mflops'] / flow['mflops']:.2f}")
    if flow is None or not found:
        return None
    spread = "" if flow["deviation"] is None else f", twice the deviation over seeds {2 * flow['deviation']:.2f}"
    reference = f"flow in 16 steps {flow['frechet_distance']:.2f}{spread}"
    return "Blockwise with residual: equal quality at half the operations", f"{'; '.join(found)}; {reference}"


def stream(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """Frames a second of the stream batch, on one device and on two, over those of one frame after another."""
    one = find(table, "stream", "frame after frame", 4)
    found = [
        f"{row['sampler']}: {one['ms_per_sample'] / row['ms_per_sample']:.2f} times"
        for row in table
        if one is not None and row["method"] == "stream" and row is not one
    ]
    return ("Stream batch: 1.4 times the throughput of sequential at 4 steps", "; ".join(found)) if found else None


def caching(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """CacheQuant against the same sampler without a cache: time and distance."""
    plain, found = find(table, "CacheQuant", "uncached", 16), []
    for row in table:
        if plain is not None and row["method"] == "CacheQuant" and "1 in" in row["sampler"]:
            faster = plain["ms_per_sample"] / row["ms_per_sample"]
            distance = f"{row['frechet_distance']:.2f} against {plain['frechet_distance']:.2f}"
            found.append(f"{row['sampler']}: {faster:.2f} times, {distance}")
    return ("Caching: 1.5 times faster at equal quality", "; ".join(found)) if found else None


def editing(table: Sequence[Row], floor: float) -> tuple[str, str] | None:
    """FlowOpt against the inversion that it begins at: how much changes, and whether the class becomes the new one."""
    found = [
        f"{row['sampler']}: {row['change']:.3f} changed, accuracy {row['accuracy']:.2f}"
        for row in table
        if row["method"] == "edit"
    ]
    return ("FlowOpt: edits nearer to the image than inversion's", "; ".join(found)) if found else None


def torchcfm(peers: Sequence[Row], table: Sequence[Row]) -> tuple[str, str] | None:
    """Training throughput and final distance beside the peer's."""
    speed = {r["peer"]: r["train_ms_per_update"] for r in peers if "train_ms_per_update" in r}
    theirs = [r for r in peers if r.get("steps") == 16]
    ours = find(table, "flow matching", "euler", 16)
    if not speed or not theirs or ours is None:
        return None
    names = {"training_distance": "training images", "frechet_distance": "held-out ones"}
    distances = "; ".join(
        f"distance to {name} {ours[key]:.2f} against {statistics.fmean(r[key] for r in theirs):.2f}"
        for key, name in names.items()
    )
    ratio = f"{speed['torchcfm'] / speed['jaxinfer']:.2f} times its training throughput"
    return "Against torchcfm: not slower, not worse", f"{ratio}; at 16 steps, {distances}"


def lines(table: Sequence[Row], floor: float, peers: Sequence[Row]) -> list[tuple[str, str]]:
    """(expected, found) of everything that was measured."""
    found = [claim(table, floor) for claim in (mean_flow, boss, blockwise, stream, caching, editing)]
    return [line for line in [*found, torchcfm(peers, table)] if line is not None]
