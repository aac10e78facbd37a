"""What the forms of the dense products decide by.

Stability: internal.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Call:
    """The static things of one product: M rows of K inputs, N outputs."""

    rows: int
    inner: int
    outer: int
    dtype: str
