"""The static side of a call of `flash`: what the forms are told besides the arrays.

Stability: internal.
"""

from __future__ import annotations

import dataclasses

from jaxinfer.pallas_kernels.attention.flash.scores import Rules


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes, rules and choices of one call.

    `block`: the caller's block sizes or None; `alibi`: slopes are given; `lse_cotangent`: of a backward pass, whether
    anything flows back through the log-sum-exp.
    """

    rules: Rules
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int
    dtype: str
    ragged: bool = False
    alibi: bool = False
    block: tuple[int, int] | None = None
    interpret: bool = False
    lse_cotangent: bool = False

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.kv_heads

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What block sizes are looked up by: queries, keys, head size."""
        return self.queries, self.keys, self.dim


def cdiv(a, b):
    """a / b rounded up, of integers or integer arrays."""
    return (a + b - 1) // b
