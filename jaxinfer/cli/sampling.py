"""The sampling parameters as command-line options: the words of the one parameter table, with dashes.

Stability: internal.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.batch import params
from jaxinfer.batch.params import SamplingParams
from jaxinfer.errors import InputError


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with one option for each line of the table but `seed` (the run's own option), given to it together
    as its argument `sampling`. typer reads options off a signature, so the signature is made here."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "sampling"]
    chosen = [option for option in params.options() if option.name != "seed"]
    added = [_parameter(option) for option in chosen]
    files = {option.name: option.flag for option in chosen if option.file}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given = {p.name: values.pop(p.name) for p in added}
        given |= {name: _read(flag, given[name]) for name, flag in files.items() if given[name] is not None}
        sampling = params.from_options(given)
        command(**values, sampling=sampling)

    vars(run)["__signature__"] = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *added)])
    run.__annotations__ = {p.name: p.annotation for p in (*own, *added)}
    return run


def _read(flag: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag}: got {str(file)!r} ({error}); accepted: a readable text file") from None


def _parameter(option: params.Option) -> inspect.Parameter:
    kind: Any = bool if option.type is bool else list[option.type] if option.multiple else option.type
    if option.file:
        kind = Path
    flag = typer.Option(option.flag, help=option.help, show_default=False, metavar="FILE" if option.file else None)
    default = False if option.type is bool else None
    annotation = Annotated[kind if option.type is bool else kind | None, flag]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


__all__ = ["SamplingParams", "with_sampling"]
