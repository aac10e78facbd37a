"""`jaxinfer methods`: the catalogue.

Stability: experimental.
"""

import dataclasses
from typing import Annotated

import typer

from jaxinfer.cli.options import AsJson


def methods(
    family: Annotated[str | None, typer.Option(help="Only this family of methods, such as cache or decode.")] = None,
    as_json: AsJson = False,
) -> None:
    """List every method: what it does, its paper, what it promises, and what to type for it.

    \b
    Example:
      jaxinfer methods --family cache
    """
    from jaxinfer import catalogue
    from jaxinfer.cli.output import print_json, print_table
    from jaxinfer.errors import InputError

    if family is not None and family not in catalogue.families():
        raise InputError(f"--family: got {family!r}; accepted: {', '.join(catalogue.families())}")
    chosen = [m for m in catalogue.METHODS if family in (None, m.family)]
    if as_json:
        print_json([dataclasses.asdict(method) for method in chosen])
    else:
        print_table(catalogue.COLUMNS, catalogue.table(chosen))
