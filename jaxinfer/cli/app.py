"""The typer application: global options, the commands, and how an exception becomes one line and an exit code.

Stability: internal.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import jaxinfer
from jaxinfer.cli import codes
from jaxinfer.cli.compare import compare
from jaxinfer.cli.doctor import doctor
from jaxinfer.cli.edit import edit
from jaxinfer.cli.generate import generate
from jaxinfer.cli.info import info
from jaxinfer.cli.methods import methods
from jaxinfer.cli.plan import plan
from jaxinfer.cli.sample import sample
from jaxinfer.cli.train import train
from jaxinfer.errors import JaxinferError

HELP = f"""Run language models with published methods that make them fast, in JAX.

Every command has its own --help with an example. To begin:

\b
  jaxinfer generate --prompt "def quicksort(xs):" --max-tokens 64

{codes.HELP}
"""

# rich_markup_mode None: help is plain text that pipes well and comes up without importing rich.
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C is an exit code of its own; a library's default would be that of an internal error."""

    @functools.wraps(command)
    def run_it(**values: Any) -> None:
        try:
            command(**values)
        except KeyboardInterrupt:
            typer.echo("jaxinfer: interrupted", err=True)
            raise typer.Exit(codes.INTERRUPTED) from None

    return run_it


for command in (generate, compare, sample, edit, info, plan, methods, doctor):
    app.command(epilog=codes.HELP)(_interruptible(command))
app.add_typer(train, name="train")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"jaxinfer {jaxinfer.__version__}")
        raise typer.Exit()


@app.callback()
def _global(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command. An error that jaxinfer raised on purpose is one line on stderr; any other has a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = "--traceback" in arguments
    if show_traceback and arguments[0] != "--traceback":  # accepted after the command's name too
        arguments.remove("--traceback")
    try:
        app(args=arguments, prog_name="jaxinfer")
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else codes.OK if exit.code is None else codes.USAGE
    except JaxinferError as error:
        if show_traceback:
            raise
        typer.echo(f"jaxinfer: {error}", err=True)
        return codes.USAGE
    except BrokenPipeError:  # the reader of our stdout went away (`| head`): no complaint, and none at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return codes.OK
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hint = "a smaller --batch-size or --max-length, --weights int8 or another --cache needs less"
        typer.echo(f"jaxinfer: out of memory: {str(error).partition(chr(10))[0]}; {hint}", err=True)
        return codes.INTERNAL
    return codes.OK
