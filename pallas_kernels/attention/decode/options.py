"""What decode, shared_prefix and tree take in common: how a score is made of a product, and how the work is done.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error


@dataclasses.dataclass(frozen=True)
class Options:
    """The static options of a call as the user gave them; `checked` says what fits them."""

    scale: float | None
    window: int | None
    softcap: float | None
    transposed: bool
    invariant: bool
    impl: str | None
    block: int | None
    interpret: bool
    unified_max: float | None = None

    def checked(self, op: str, dim: int) -> Options:
        """With the scale filled in and all numbers floats; ArgumentError for what is no option of `op`."""
        check.positive(op, window=self.window, block=self.block)
        for name, low in (("scale", None), ("softcap", 0.0), ("unified_max", None)):
            got = getattr(self, name)
            number = isinstance(got, int | float | np.floating) and math.isfinite(got)
            if got is not None and not (number and (low is None or got > low)):
                raise argument_error(op, name, repr(got), "a finite number" + ("" if low is None else f" over {low}"))
        for name in ("transposed", "invariant", "interpret"):
            if not isinstance(getattr(self, name), bool):
                raise argument_error(op, name, repr(getattr(self, name)), "True or False")
        return dataclasses.replace(
            self,
            scale=dim**-0.5 if self.scale is None else float(self.scale),
            softcap=None if self.softcap is None else float(self.softcap),
            unified_max=None if self.unified_max is None else float(self.unified_max),
        )

    def of_call(self) -> dict:
        """The fields of a `Call` that are options."""
        fields = dataclasses.asdict(self)
        del fields["impl"]
        return fields


def checked_slopes(op: str, alibi: jax.Array | None, heads: int) -> jax.Array | None:
    """ALiBi's slopes as f32[H], or None."""
    if alibi is None:
        return None
    check.shapes(op, alibi=(alibi, str(heads)))
    return jnp.asarray(alibi, jnp.float32)


def checked_lengths(op: str, name: str, lengths: jax.Array | None, count: int, capacity: int) -> jax.Array:
    """Live tokens of each of `count` rows, i32 from 0 to `capacity`; None: all of them."""
    if lengths is None:
        return jnp.full(count, capacity, jnp.int32)
    check.shapes(op, **{name: (lengths, str(count))})
    check.integers(op, **{name: lengths})
    check.within(op, 0, capacity, **{name: lengths})
    return jnp.clip(jnp.asarray(lengths, jnp.int32), 0, capacity)
