"""What `sample` and `edit` share: the options of a sampler, and what they stand for.

Stability: internal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.errors import ConfigError

if TYPE_CHECKING:
    from jaxinfer.flow.adaptive import Tolerance
    from jaxinfer.flow.model import FlowModel
    from jaxinfer.flow.solve import FixedStep

Model = Annotated[Path, typer.Option("--model", help="Folder that `jaxinfer train flow` wrote.")]
Output = Annotated[Path, typer.Option("--output", help="NAME: the images go to NAME.png and NAME.npz.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Steps of the solver.")]
Solver = Annotated[
    str,
    typer.Option("--solver", help="euler (1 evaluation a step), heun, midpoint (2), dopri5, mean (of MeanFlow, 1)."),
]
Schedule = Annotated[
    str, typer.Option("--schedule", help="uniform, shift, cosine, edm, or increasing times from 0 to 1: 0,0.2,1.")
]
Scale = Annotated[float, typer.Option("--guidance", help="How strongly the class is followed; 1: as trained.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all draws.")]


def load(folder: Path) -> FlowModel:
    """The model of `--model`. Compiled programs are kept from here on."""
    from jaxinfer.cli import compiled
    from jaxinfer.flow import checkpoint

    compiled.use_cache()
    return checkpoint.load(folder)


def grid(schedule: str, steps: int) -> Any:
    """The times of `--schedule` and `--steps`."""
    from jaxinfer.flow import schedule as schedules

    if "," not in schedule:
        return schedules.make(schedule, steps)
    try:
        return schedules.make([float(part) for part in schedule.split(",")])
    except ValueError as error:
        raise ConfigError(f"--schedule {schedule}: {error}") from None


def solver(name: str, model: FlowModel) -> FixedStep | Tolerance:
    """The solver of `--solver`; auto is the model's own."""
    from jaxinfer.flow import adaptive, meanflow, solve

    if name == "auto":
        return model.default_solver
    if name == "dopri5":
        return adaptive.Tolerance()
    return meanflow.solve_mean if name == "mean" else solve.by_name(name)


def write(output: Path, images: Any, **arrays: Any) -> dict[str, str]:
    """NAME.npz with the images, u8[N,H,W,C], and what comes with them, and NAME.png; the paths."""
    import numpy as np

    from jaxinfer.evals import picture

    base = output.with_suffix("") if output.suffix in (".png", ".npz") else output
    base.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.round((np.asarray(images) + 1.0) * 127.5).clip(0, 255).astype(np.uint8)
    files = {"png": f"{base}.png", "npz": f"{base}.npz"}
    np.savez_compressed(files["npz"], images=pixels, **arrays)
    picture.save_grid(files["png"], images[:400])
    return files
