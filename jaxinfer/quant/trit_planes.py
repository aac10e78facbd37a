"""Two trit-planes: a weight as the sum of two ternary matrices, each with a scale a group, fitted without data.

`w ~ a1 t1 + a2 t2` with t in {-1, 0, 1}. Both scales of a group are the least-squares ones for its codes, then every
element takes the best of the nine sums, and again, until nothing changes or `steps` are done; an iteration never
raises a group's error. Each plane is stored in two bits a code, so its products are ternary products, added.
Guarantee: approximate. State: none.
Source: Xiao et al. 2025, PTQTP, 2509.16989 (its ridge, raised with the condition number, is here a constant `ridge`
relative to the group; start: the scales 4/3 and 4/9 of the mean magnitude, codes of the nearest sums).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, nearest
from jaxinfer.pallas_kernels.matmul.weight import LowBit, make
from jaxinfer.quant.quantized import FLOATS, QuantizedArray, check_group, checked_rows, groups_of, is_finite
from jaxinfer.quant.tree import map_axes

SUMS = [(a, b) for a in (-1.0, 0.0, 1.0) for b in (-1.0, 0.0, 1.0)]


@struct.dataclass
class SumArray:
    """The sum of two weights of one shape: two trit-planes, or any other pair."""

    first: Any
    second: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.first.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.first.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the first."""
        return self.first.dtype

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> SumArray:
        """The same leaf with logical axis names in place of arrays."""
        return SumArray(map_axes(self.first, logical_axes), map_axes(self.second, logical_axes))

    def check(self) -> None:
        """Raise InputError where the parts contradict each other."""
        if tuple(self.first.shape) != tuple(self.second.shape):
            raise InputError(f"parts of shapes {tuple(self.first.shape)} and {tuple(self.second.shape)} have no sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritPlanes:
    """`group`: inputs that share two scales; `steps`: most iterations; `ridge`: of the least squares, relative."""

    group: int | None = 128
    steps: int = 50
    ridge: float = 1e-6
    scales: str = "float32"
    axis: int | None = None

    def __post_init__(self):
        check_group("TritPlanes", self.group)
        if type(self.steps) is not int or self.steps < 1:
            raise ConfigError(f"TritPlanes: steps must be a positive integer, got {self.steps!r}")
        if not self.ridge > 0:
            raise ConfigError(f"TritPlanes: ridge must be above 0, got {self.ridge!r}")
        if self.scales not in FLOATS:
            raise ConfigError(f"TritPlanes: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")
        if self.axis not in (None, -1, -2):
            raise ConfigError(f"TritPlanes: axis must be -1, -2 or None, got {self.axis!r}")

    def quantize(self, weight: Any, *, axis: int = -2) -> SumArray:
        """Fit two planes to `weight`; errors as those of `RowSpec.quantize`."""
        axis = axis if self.axis is None else self.axis
        planes = _planes(self, checked_rows("TritPlanes", weight, axis))
        if not all(is_finite(plane.scales) for plane in planes):
            raise InputError(f"the weight holds values that are not finite, or too large for {self.scales} scales")
        dtype = str(weight.dtype)
        leaves = (QuantizedArray(p.codes, p.scales, element="int2", axis=axis, logical_dtype=dtype) for p in planes)
        return SumArray(*leaves)


@jax.jit
def _nearest_sums(x: jax.Array, scales: jax.Array) -> jax.Array:
    """The best of nine sums for each element: `x[..., G, g]`, `scales[..., G, 2]` -> codes `[..., G, g, 2]`."""
    sums = jnp.array(SUMS)
    best, codes = jnp.full(x.shape, jnp.inf), jnp.zeros((*x.shape, 2))
    for pair in sums:
        distance = jnp.abs(x - (scales @ pair)[..., None])
        codes = jnp.where((distance < best)[..., None], pair, codes)
        best = jnp.minimum(distance, best)
    return codes


def fit(x: jax.Array, steps: int, ridge: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x[..., G, g]` as `(scales [..., G, 2], codes [..., G, g, 2], squared error of every step [steps + 1])`."""
    start = jnp.abs(x).mean(-1)[..., None] * jnp.array([4 / 3, 4 / 9])
    codes = _nearest_sums(x, start)

    def error(scales, codes):
        return jnp.sum((x - jnp.einsum("...kp,...p->...k", codes, scales)) ** 2)

    def step(state, _):
        scales, codes = state
        a, b, c = ((codes[..., i] * codes[..., j]).sum(-1) for i, j in ((0, 0), (0, 1), (1, 1)))
        p, q = ((codes[..., i] * x).sum(-1) for i in (0, 1))
        a, c = a + ridge * x.shape[-1], c + ridge * x.shape[-1]
        fitted = jnp.stack([c * p - b * q, a * q - b * p], -1) / (a * c - b * b)[..., None]
        codes = _nearest_sums(x, fitted)
        return (fitted, codes), error(fitted, codes)

    (scales, codes), errors = jax.lax.scan(step, (start, codes), None, steps)
    return scales, codes, jnp.concatenate([error(start, _nearest_sums(x, start))[None], errors])


def _planes(spec: TritPlanes, rows: jax.Array) -> tuple[LowBit, LowBit]:
    return jax.jit(_planes_of, static_argnums=0)(spec, rows)


def _planes_of(spec: TritPlanes, rows: jax.Array) -> tuple[LowBit, LowBit]:
    groups = groups_of("TritPlanes", rows.shape[-1], spec.group, "int2")
    x = rows.reshape(*rows.shape[:-1], groups, -1)
    scales, _, _ = fit(x, spec.steps, spec.ridge)
    scales = scales.astype(spec.scales)
    codes = _nearest_sums(x, scales.astype(jnp.float32))

    def plane(i: int) -> LowBit:
        fields = nearest(codes[..., i], ELEMENTS["int2"]).reshape(rows.shape)
        return make(fields, scales[..., i], "int2")

    return plane(0), plane(1)


ops.register(
    SumArray,
    ops.Rules(
        materialize=lambda w: ops.materialize(w.first) + ops.materialize(w.second),
        dot=lambda x, w: ops.dot(x, w.first) + ops.dot(x, w.second),
        dot_transposed=lambda x, w: ops.dot_transposed(x, w.first) + ops.dot_transposed(x, w.second),
        take=lambda w, ids: ops.take(w.first, ids) + ops.take(w.second, ids),
        ragged_dot=lambda x, w, sizes: ops.ragged_dot(x, w.first, sizes) + ops.ragged_dot(x, w.second, sizes),
    ),
)
