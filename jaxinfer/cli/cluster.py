"""The options that join several processes, one command in each: `--coordinator`, `--processes`, `--process-id`.

Stability: internal.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jaxinfer.cli import codes

Coordinator = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Run in several processes, the same command in each; this is where process 0 is. auto: as SLURM, a TPU "
        "slice or a Kubernetes indexed Job says.",
    ),
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="With --coordinator: how many there are.")]
ProcessId = Annotated[
    int | None, typer.Option("--process-id", min=0, help="With --coordinator: which this is, from 0.")
]
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("coordinator", Coordinator),
    ("processes", Processes),
    ("process_id", ProcessId),
)


def clustered(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the three options, run with the processes joined; an argument `watch` of it is given the joined
    processes' Watch, or None for one process. typer reads options off a signature, so the signature is made here."""
    parameters = inspect.signature(command, eval_str=True).parameters
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p.replace(kind=kind) for name, p in parameters.items() if name != "watch"]
    added = [inspect.Parameter(name, kind, default=None, annotation=annotation) for name, annotation in OPTIONS]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = [values.pop(name) for name, _ in OPTIONS]
        if given == [None, None, None]:  # nothing of this is even imported
            command(**values)
            return
        from jaxinfer.sharding import launch

        ended = None
        try:
            with launch.joined(launch.launch_of(*given)) as watch:
                try:
                    command(**values, **({"watch": watch} if "watch" in parameters else {}))
                except typer.Exit as exit:  # an end like any other, which the other processes come to as well
                    ended = exit
        except launch.PeerLost as error:
            typer.echo(f"jaxinfer: {error}", err=True)
            raise typer.Exit(codes.RETRY) from None
        if ended is not None:
            raise ended

    vars(run)["__signature__"] = inspect.Signature([*own, *added])
    run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return run
