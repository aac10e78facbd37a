"""The benchmark's picture: a row of samples of each method, and the distance over the evaluations a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw(path: Path, rows: Sequence[Mapping[str, Any]], images: Mapping[str, np.ndarray], floor: float) -> None:
    """`rows` of the table; `images` f32[N,H,W,1] of a method's name. Needs matplotlib."""
    from matplotlib.figure import Figure

    images = _shown(images)
    figure = Figure(figsize=(13, max(5.0, 0.4 * len(images) + 1.0)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    strips = [np.concatenate(list(sample[:16, :, :, 0]), axis=1) for sample in images.values()]
    left.imshow(np.concatenate(strips), cmap="gray", vmin=-1, vmax=1, aspect="equal", interpolation="nearest")
    height = strips[0].shape[0]
    left.set_yticks([height * (i + 0.5) for i in range(len(strips))], list(images), fontsize=8)
    left.set_xticks([])
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(f"{row['method']}: {row['sampler']}", []).append((row["evaluations"], row["frechet_distance"]))
    for i, (name, points) in enumerate(lines.items()):
        right.plot(*zip(*sorted(points), strict=True), marker="os^vD"[i % 5], label=name, linewidth=1)
    right.axhline(floor, color="black", linewidth=1, linestyle=":", label="train-test floor")
    right.set(xscale="log", yscale="log", xlabel="evaluations a sample", ylabel="Fréchet distance")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def _shown(images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of "method, sampler, steps" the most steps of each sampler, and what takes one step."""
    most: dict[str, int] = {}
    for name in images:
        sampler, _, steps = name.rpartition(", ")
        most[sampler] = max(most.get(sampler, 0), int(steps))

    def chosen(name: str) -> bool:
        sampler, _, steps = name.rpartition(", ")
        return int(steps) in (1, most[sampler])

    return {name: image for name, image in images.items() if chosen(name)}
