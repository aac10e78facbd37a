"""`jaxinfer edit`: images changed by a trained flow, from one class to another or where a mask says.

Stability: experimental.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli import flow_options, training

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.flow.model import FlowModel


def edit(
    model: flow_options.Model,
    source: Annotated[Path, typer.Option("--input", help="A PNG of one image, or an npz with images[N,H,W,C].")],
    output: flow_options.Output,
    to: Annotated[str | None, typer.Option("--to", help="Class that the images become.")] = None,
    before: Annotated[
        str | None, typer.Option("--from", help="Class that they are of; default: the npz file's labels.")
    ] = None,
    start: Annotated[
        float, typer.Option("--start", min=0, help="Time that is gone back to: 0 is noise; 0.5 keeps more.")
    ] = 0.0,
    refine: Annotated[
        int,
        typer.Option(
            "--refine",
            min=0,
            help="Iterations of FlowOpt: each is nearer to the input, and less of an edit; the paper has 8.",
        ),
    ] = 0,
    mask: Annotated[
        str | None, typer.Option("--mask", help="Paint here: left, right, top, bottom, or an npz with mask[N,H,W].")
    ] = None,
    steps: flow_options.Steps = 32,
    solver: flow_options.Solver = "midpoint",
    schedule: flow_options.Schedule = "uniform",
    guidance: flow_options.Scale = 1.0,
    seed: flow_options.Seed = 0,
) -> None:
    """Change images: into another class (--to) by inversion, or in a hole (--mask) by a model trained to inpaint.

    \b
    Example:
      jaxinfer edit --model runs/glyphs --input letter.png --from A --to B --start 0.3 --output out/edited
      jaxinfer edit --model runs/glyphs --input letter.png --from A --to B --refine 8 --output out/nearer
      jaxinfer edit --model runs/holes --input letters.npz --mask right --output out/painted
    """
    import jax
    import numpy as np

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.errors import ConfigError
    from jaxinfer.flow.adaptive import Tolerance
    from jaxinfer.flow.guide import Guidance
    from jaxinfer.flow.solve import SOLVERS
    from jaxinfer.flow.types import Condition

    if (to is None) == (mask is None):
        raise ConfigError("give either --to, a class, or --mask, a hole")
    if refine and mask is not None:
        raise ConfigError("--refine is of an edit to another class (--to), not of a hole")
    flow, ts = flow_options.load(model), flow_options.grid(schedule, steps)
    chosen = flow_options.solver(solver, flow)
    if isinstance(chosen, Tolerance) or chosen not in SOLVERS.values():
        raise ConfigError("edit takes a solver of fixed steps: euler, heun or midpoint")
    images, labels = _read(source, flow)
    if before is not None:
        labels = np.repeat(flow.labels([before]), len(images))
    training.check_writable(output.absolute().parent)
    guide = Guidance(guidance)
    if mask is not None:
        hole = _mask(mask, images.shape)
        known = labels if len(flow.classes) > 1 else None
        if known is None and len(flow.classes) > 1:
            known = np.full(len(images), -1, np.int32)
        changed = flow.inpaint(jax.random.key(seed), images, hole, known, ts, solver=chosen, guidance=guide)
    else:
        if labels is None:
            raise ConfigError(f"{source} has no labels: give --from, the class that the images are of")
        after = np.repeat(flow.labels([to]), len(images))
        conds = Condition(labels=labels), Condition(labels=after)
        key = jax.random.key(seed)
        changed = flow.edit(images, *conds, ts, solver=chosen, guidance=guide, start=start, refine=refine, key=key)
        labels = after
    files = flow_options.write(output, np.asarray(changed), **({} if labels is None else {"labels": labels}))
    moved = float(np.abs(np.asarray(changed) - images).mean())
    note(f"wrote {files['png']} and {files['npz']}: {len(images)} images, changed by {moved:.3f} a pixel of 2")
    print_json({**files, "count": len(images), "mean_change": round(moved, 5)})


def _read(source: Path, flow: "FlowModel") -> "tuple[np.ndarray, np.ndarray | None]":
    import numpy as np

    from jaxinfer.errors import InputError
    from jaxinfer.evals import picture
    from jaxinfer.flow import data

    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if source.suffix == ".npz":
        found = data.from_file(source)
        with np.load(source) as arrays:
            images, labels = found.images, found.labels if "labels" in arrays.files else None
    else:
        images, labels = picture.read(source, flow.image_shape[-1])[None], None
    if images.shape[1:] != flow.image_shape:
        raise InputError(f"{source}: images are {images.shape[1:]}, the model's are {flow.image_shape}")
    return images, labels


def _mask(name: str, shape: tuple[int, ...]) -> "np.ndarray":
    """The hole bool[N,H,W,1] of a side's name or of an npz file."""
    import numpy as np

    from jaxinfer.errors import InputError

    n, h, w, _ = shape
    hole = np.zeros((n, h, w, 1), bool)
    sides = {
        "left": np.s_[:, :, : w // 2],
        "right": np.s_[:, :, w // 2 :],
        "top": np.s_[:, : h // 2],
        "bottom": np.s_[:, h // 2 :],
    }
    if name in sides:
        hole[sides[name]] = True
        return hole
    path = Path(name)
    if path.suffix != ".npz" or not path.is_file():
        raise InputError(f"mask {name!r} is none of {', '.join(sides)} and no npz file")
    with np.load(path) as arrays:
        if "mask" not in arrays.files or arrays["mask"].shape[-2:] != (h, w):
            raise InputError(f"{path}: needs mask[N,{h},{w}], has {arrays.files}")
        return np.broadcast_to(arrays["mask"].astype(bool).reshape(-1, h, w, 1), hole.shape).copy()
