"""What the catalogue says of a method.

Stability: experimental.
"""

import dataclasses

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

    `entry` is "module:attribute"; `cli` what a batch user types, if anything; `effect` the row of a benchmark
    that shows what it brings ("decoding:task:method", "sharding:mesh", ...: `scripts/make_readme.py` knows which); the
    README's table has its figure.
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
