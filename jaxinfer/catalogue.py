"""One table of every method: name, family, paper, guarantee, where it is defined, and how the command line spells it.

`jaxinfer methods` prints it, the README's table is made from it (scripts/make_readme.py), and a test imports every
entry and checks that every method file is listed. A new method adds its file and its row here.

Stability: experimental.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxinfer.errors import InputError

GUARANTEES = ("exact", "exact in distribution", "approximate", "a different model")


@dataclasses.dataclass(frozen=True)
class Paper:
    """Where a method comes from; `arxiv` is None for a paper that is not there."""

    authors: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        return f"{self.authors} {self.year}" + (f", arXiv {self.arxiv}" if self.arxiv else "")


@dataclasses.dataclass(frozen=True)
class Method:
    """One method. `paper` is None for what is common knowledge.

    `entry` is "module:attribute"; `cli` what a batch user types, if anything; `effect` the key of the method's row in
    the results of its family's benchmark.
    """

    name: str
    family: str
    title: str
    guarantee: str
    entry: str
    paper: Paper | None = None
    cli: str | None = None
    effect: str | None = None

    def __post_init__(self):
        if self.guarantee not in GUARANTEES:
            raise InputError(f"method {self.name!r}: guarantee {self.guarantee!r} is none of {GUARANTEES}")
        if self.entry.count(":") != 1:
            raise InputError(f"method {self.name!r}: entry {self.entry!r} is not 'module:attribute'")


METHODS: tuple[Method, ...] = (
    Method(
        name="dense",
        family="cache",
        title="every key and value kept",
        guarantee="exact",
        entry="jaxinfer.cache.dense:Dense",
    ),
    Method(
        name="ring",
        family="cache",
        title="the keys and values of a sliding window",
        guarantee="exact",
        entry="jaxinfer.cache.dense:Dense",
    ),
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
