"""What the forms of the low-bit products decide by: one record for all of them.

Stability: internal.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels.matmul.weight import LowBit, check_product


@dataclasses.dataclass(frozen=True)
class Call:
    """The static things of one call. `block`: outputs at a time; `activations`: what x is rounded to, "float" for not
    at all; `per_group`: whether x then has a scale for each of the weight's groups."""

    m: int
    n: int
    k: int
    groups: int
    element: str
    dtype: str
    zeros: bool
    block: int | None = None
    interpret: bool = False
    per_group: bool = False
    activations: str = "float"


def checked_call(
    op: str,
    x: jax.Array,
    w: LowBit,
    *,
    block: int | None,
    interpret: bool,
    per_group: bool = False,
    activations: str = "float",
) -> Call:
    """The record of a call whose arrays fit each other; else ArgumentError."""
    check_product(op, x, w)
    check.positive(op, block=block)
    sizes = (x.shape[0], w.outputs, w.inputs, w.groups, w.element, str(x.dtype))
    return Call(*sizes, w.zeros is not None, block, interpret, per_group, activations)
