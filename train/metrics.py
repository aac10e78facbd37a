"""What a training run writes down: one JSON object a logged step, a progress bar, and the curve as PNG.

Stability: experimental.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import CheckpointError


def read(path: str | Path) -> list[dict]:
    """The objects of a metrics file; a last line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Appends to a JSONL file. Rows after `first_step` are dropped on entry: a resumed run makes them again.

    `write` False writes and shows nothing: of several processes one does.
    """

    def __init__(self, path: str | Path, *, first_step: int, last_step: int, write: bool = True):
        self.path, self.first_step, self.last_step = Path(path if write else os.devnull), first_step, last_step
        self._show = write and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> "Metrics":
        kept = [row for row in read(self.path) if row["step"] <= self.first_step] if self.path.exists() else []
        self._total = max((row.get("total_tokens", 0) for row in kept), default=0)
        self._seconds = max((row.get("total_seconds", 0.0) for row in kept), default=0.0)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        for row in kept:
            self._write(row)
        self._last = self.first_step
        if self._show:
            self._bar = _bar()
            self._task = self._bar.add_task("", total=self.last_step, completed=self.first_step, words="")
            self._bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, values: Mapping[str, float], *, tokens: int, seconds: float, data_wait: float) -> None:
        """One row: the values of the last update, and tokens and seconds since the row before."""
        count = max(step - self._last, 1)
        self._total, self._seconds = self._total + tokens, self._seconds + seconds
        row = {
            "step": step,
            **values,
            "tokens": tokens,
            "total_tokens": self._total,
            "step_seconds": seconds / count,
            "data_wait_seconds": data_wait / count,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "total_seconds": self._seconds,
            "time": round(time.time(), 3),
        }
        self._write(row)
        self._last = step
        if self._bar is not None:
            words = f"loss {values['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, words=words)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """One row `{"step", "evaluation": {...}}`."""
        self._write({"step": step, "evaluation": dict(values), "time": round(time.time(), 3)})

    def _write(self, row: Mapping) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _bar() -> Any:
    """Updates, loss and the time that is left, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def draw_curve(metrics: str | Path, png: str | Path, *, name: str = "loss") -> bool:
    """Draws training loss and every evaluated value over tokens; False (and no file) where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = read(metrics)
    steps = [row for row in rows if name in row]
    if not steps:
        raise CheckpointError(f"{metrics} has no row with {name!r} to draw")
    tokens = {row["step"]: row["total_tokens"] for row in steps}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["total_tokens"] for row in steps], [row[name] for row in steps], lw=0.5, label=f"training {name}")
    evaluated = [row for row in rows if "evaluation" in row and row["step"] in tokens]
    for key in sorted({key for row in evaluated for key in row["evaluation"]}):
        points = [(tokens[row["step"]], row["evaluation"][key]) for row in evaluated if key in row["evaluation"]]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"held-out {key.replace('_', ' ')}")
    axes.set(xlabel="training tokens", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)
    return True
