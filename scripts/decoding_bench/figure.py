"""The picture of bench_decoding's table: speed-up of every method, a panel a model, batch size and temperature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write a PNG: methods down, task sets across, each cell the measured speed-up and the tokens a forward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(rows)
    panels = list(dict.fromkeys((row["model"], row["batch"], row["temperature"]) for row in rows))
    height = max(len({row["method"] for row in rows}) * 0.3 + 1, 2)
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, height * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _panel(axis, [row for row in rows if (row["model"], row["batch"], row["temperature"]) == panel])
        axis.set_title(f"{panel[0]}, batch {panel[1]}, temperature {panel[2]:g}: times plain (tokens a forward)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _panel(axis: Any, rows: list[Mapping[str, Any]]) -> None:
    methods, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "task"))
    found = {(row["method"], row["task"]): row for row in rows}
    values = [[found.get((m, t), {}).get("speedup", float("nan")) for t in tasks] for m in methods]
    axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=2, aspect="auto")
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(range(len(methods)), methods)
    for i, method in enumerate(methods):
        for j, task in enumerate(tasks):
            if row := found.get((method, task)):
                text = f"{row['speedup']:.2f} ({row['tokens_per_forward']:.2f})"
                axis.text(j, i, text, ha="center", va="center", fontsize=8)
