"""A dense weight that stands output by output: `[N, K]` in memory, whatever way round the model names it.

    params = quant.apply(params, [(".*/(attention|mlp)/.*", quant.Transposed())])

Guarantee: exact: the same products, up to the order of float32 sums. State: none. It costs no memory. On a CPU,
products of 2 to 16 rows (drafts under verification, small batches) read such a weight in its order: see
`pallas_kernels/matmul/dense`. Embedding tables and tied heads stand so already and are left as they are.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import InputError


@struct.dataclass
class TransposedArray:
    """`rows [..., N, K]`, the outputs first; logically `[..., K, N]`."""

    rows: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        *lead, n, k = self.rows.shape
        return (*lead, k, n)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.rows.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight."""
        return jnp.dtype(self.rows.dtype)

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> TransposedArray:
        """The same leaf with logical axis names in place of the array."""
        *lead, k, n = logical_axes
        return TransposedArray((*lead, n, k))  # pyright: ignore[reportArgumentType]  # names stand where arrays stood

    def check(self) -> None:
        """Raise InputError where the array is no matrix."""
        if len(self.rows.shape) < 2:
            raise InputError(f"rows must be [..., N, K], got {list(self.rows.shape)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transposed:
    """The spec: kernels `[..., K, N]` become `TransposedArray`; what stands output by output already stays an array."""

    def quantize(self, weight: Any, *, axis: int = -2) -> Any:
        """The leaf for `weight`; raises InputError for what is no matrix."""
        if len(weight.shape) < 2:
            raise InputError(f"Transposed takes matrices, got {weight.dtype}{list(weight.shape)}")
        return TransposedArray(jnp.swapaxes(jnp.asarray(weight), -1, -2)) if axis == -2 else weight


def _materialize(w: TransposedArray) -> jax.Array:
    return jnp.swapaxes(w.rows, -1, -2)


ops.register(
    TransposedArray,
    ops.Rules(
        materialize=_materialize,
        dot=lambda x, w: ops.dot_transposed(x, w.rows),
        dot_transposed=lambda x, w: ops.dot(x, w.rows),
        take=lambda w, ids: jnp.moveaxis(jnp.take(w.rows, ids, axis=-1, mode="clip"), 0, -1),
    ),
)
