"""One table of every method: name, family, paper, guarantee, where it is defined, and how the command line spells it.

`jaxinfer methods` prints it, the README's table is made from it (scripts/make_readme.py), and a test imports every
entry and checks that every method file is listed. A new method adds its file, and its row to a table of this folder.

Stability: experimental.
"""

from collections.abc import Iterable, Sequence

from jaxinfer.catalogue import decoding, flow, models, sharding, training
from jaxinfer.catalogue.entry import GUARANTEES, Method, Paper
from jaxinfer.errors import InputError

METHODS: tuple[Method, ...] = (
    *decoding.METHODS,
    *models.METHODS,
    *training.METHODS,
    *flow.METHODS,
    *sharding.METHODS,
)


def by_name(name: str) -> Method:
    """The method of that name; InputError lists the names there are."""
    for method in METHODS:
        if method.name == name:
            return method
    raise InputError(f"no method {name!r}; methods: {', '.join(sorted(m.name for m in METHODS))}")


def families(methods: Iterable[Method] = METHODS) -> tuple[str, ...]:
    """The families in the order in which they first appear."""
    return tuple(dict.fromkeys(method.family for method in methods))


COLUMNS = ("method", "family", "what it does", "paper", "guarantee", "command line")


def table(methods: Sequence[Method] = METHODS) -> list[tuple[str, ...]]:
    """The catalogue as rows of text under `COLUMNS`, grouped by family: what `jaxinfer methods` and the README show."""
    order = families(methods)
    return [
        (m.name, m.family, m.title, str(m.paper or ""), m.guarantee, m.cli or "")
        for m in sorted(methods, key=lambda m: order.index(m.family))
    ]


__all__ = ["COLUMNS", "GUARANTEES", "METHODS", "Method", "Paper", "by_name", "families", "table"]
