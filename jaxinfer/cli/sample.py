"""`jaxinfer sample`: images from a trained flow.

Stability: experimental.
"""

from typing import Annotated

import typer

from jaxinfer.cli import flow_options, training

CHUNK = 256


def sample(
    model: flow_options.Model,
    output: flow_options.Output,
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Names of classes, by commas, in turn; none: no class. Default: all."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Images in all.")] = 64,
    steps: flow_options.Steps = 16,
    solver: flow_options.Solver = "auto",
    schedule: flow_options.Schedule = "uniform",
    guidance: flow_options.Scale = 1.0,
    interval: Annotated[
        str, typer.Option("--guidance-interval", help="Times that are guided, START,END: 0 is noise, 1 the image.")
    ] = "0,1",
    seed: flow_options.Seed = 0,
) -> None:
    """Draw images from a flow that `jaxinfer train flow` trained: a PNG of all in a grid, and an npz file.

    \b
    Example:
      jaxinfer sample --model runs/glyphs --classes A,B,7 --count 36 --steps 8 --guidance 1.5 --output out/letters
    """
    import time

    import jax
    import numpy as np

    from jaxinfer.cli.output import note, print_json
    from jaxinfer.errors import ConfigError
    from jaxinfer.flow.adaptive import Tolerance
    from jaxinfer.flow.guide import Guidance
    from jaxinfer.flow.types import Condition

    flow, ts = flow_options.load(model), flow_options.grid(schedule, steps)
    chosen = flow_options.solver(solver, flow)
    try:
        start, end = (float(part) for part in interval.split(","))
    except ValueError:
        raise ConfigError(f"--guidance-interval is START,END, got {interval!r}") from None
    guide = Guidance(guidance, start, end)
    if flow.condition != "class":
        raise ConfigError(f"this model draws from an image beside the noise ({flow.condition}): see `jaxinfer edit`")
    names = list(flow.classes) if classes is None else classes.split(",")
    cycle = flow.labels(names)
    labels = np.resize(cycle, count) if len(flow.classes) > 1 and len(cycle) else None
    training.check_writable(output.absolute().parent)
    tell, parts = training.counter("images"), []
    key, started = jax.random.key(seed), time.perf_counter()
    for first in range(0, count, CHUNK):
        rows = min(CHUNK, count - first)
        cond = Condition(labels=None if labels is None else labels[first : first + rows])
        images = flow.sample(key, cond, rows, ts, solver=chosen, guidance=guide, first=first)
        parts.append(np.asarray(images))
        tell(first + rows, count)
    seconds = time.perf_counter() - started
    files = flow_options.write(output, np.concatenate(parts), **({} if labels is None else {"labels": labels}))
    each = None if isinstance(chosen, Tolerance) else (len(ts) - 1) * chosen.evaluations
    note(f"wrote {files['png']} and {files['npz']}: {count} images in {seconds:.1f} s, compilation among them")
    print_json({**files, "count": count, "evaluations": each, "guided": guidance != 1.0, "seconds": round(seconds, 3)})
