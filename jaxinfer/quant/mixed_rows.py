"""Output channels of two precisions: the channels that lose most in the low format are stored in the high one.

A share of a weight's outputs (10 % in the paper) is int8, the rest int4 with zero points, both in groups of 128; the
product computes both parts and puts their outputs in order. Guarantee: approximate. State: none.
Source: Zheng et al. 2024, MixLLM, 2412.14590.
Departures: the paper ranks the channels of the whole model by |g d + (g d)^2 / 2| with the loss gradient g and the
rounding error d; here `scores` may bring any ranking of one weight's channels and the default is the squared rounding
error alone, which needs no data, so each weight has the same share. Codes are rounded to nearest.

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
from jaxinfer.quant.integers import Int4, Int8
from jaxinfer.quant.quantized import FLOATS, check_group, checked_rows
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class MixedRows:
    """The outputs of `low`, then those of `high`, in the order `order i32[..., N]`: output i is number `order[i]`.

    `axis` is the input axis, as of the parts: -2 for `[..., K, N]`, -1 for `[..., N, K]`.
    """

    low: Any
    high: Any
    order: jax.Array
    axis: int = struct.field(pytree_node=False, default=-2)

    @property
    def out_axis(self) -> int:
        """The logical axis of the outputs."""
        return -3 - self.axis

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        shape = list(self.low.shape)
        shape[self.out_axis] += self.high.shape[self.out_axis]
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.low.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight that this stands for."""
        return self.low.dtype

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> MixedRows:
        """The same leaf with logical axis names in place of arrays; outputs, whose parts are uneven, are not split."""
        axes = list(logical_axes)
        axes[self.out_axis] = None
        low, high = (map_axes(part, tuple(axes)) for part in (self.low, self.high))
        return dataclasses.replace(self, low=low, high=high, order=(*axes[:-2], None))

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        low, high = list(self.low.shape), list(self.high.shape)
        if self.axis not in (-1, -2) or len(low) < 2 or len(low) != len(high):
            raise InputError(f"parts {tuple(low)} and {tuple(high)} do not fit together with input axis {self.axis}")
        n = low[self.out_axis] + high[self.out_axis]
        low[self.out_axis] = high[self.out_axis]
        if low != high or tuple(self.order.shape) != (*low[:-2], n) or self.order.dtype != jnp.int32:
            order = f"{self.order.dtype}{list(self.order.shape)}"
            raise InputError(f"parts {tuple(low)} and {tuple(high)} and order {order} do not fit together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed:
    """`share` of the outputs in int8, the rest in int4 with zero points. `group`: inputs that share a scale."""

    share: float = 0.1
    group: int | None = 128
    scales: str = "float32"
    activations: str = "float"
    axis: int | None = None

    def __post_init__(self):
        check_group("Mixed", self.group)
        if not 0 < self.share < 1:
            raise ConfigError(f"Mixed: share must lie between 0 and 1, got {self.share!r}")
        if self.scales not in FLOATS:
            raise ConfigError(f"Mixed: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")
        if self.axis not in (None, -1, -2):
            raise ConfigError(f"Mixed: axis must be -1, -2 or None, got {self.axis!r}")

    def quantize(self, weight: Any, *, axis: int = -2, scores: jax.Array | None = None) -> MixedRows:
        """Quantize `weight`; the outputs of the highest `scores[..., N]` become int8. Errors as `RowSpec.quantize`."""
        axis = axis if self.axis is None else self.axis
        rows = checked_rows("Mixed", weight, axis)
        n = rows.shape[-2]
        count = min(max(1, round(self.share * n)), n - 1)
        if n < 2:
            raise ConfigError(f"Mixed: a weight of {n} outputs has no two parts")
        options: dict[str, Any] = {"group": self.group, "scales": self.scales, "activations": self.activations}
        low, high = Int4(**options), Int8(**options)
        if scores is None:
            scores = jnp.sum((ops.materialize(low.quantize(rows, axis=-1)) - rows) ** 2, -1)
        elif tuple(scores.shape) != rows.shape[:-1]:
            raise InputError(
                f"Mixed: scores of shape {tuple(scores.shape)} do not rank {list(rows.shape[:-1])} outputs"
            )
        ranked = jnp.argsort(scores, axis=-1, stable=True)  # ascending: the last `count` become int8
        source = jnp.concatenate([jnp.sort(ranked[..., : n - count]), jnp.sort(ranked[..., n - count :])], -1)
        sorted_rows = jnp.take_along_axis(rows, source[..., None], -2)
        parts = []
        for spec, part in ((low, sorted_rows[..., : n - count, :]), (high, sorted_rows[..., n - count :, :])):
            part = part if axis == -1 else jnp.swapaxes(part, -1, -2)
            parts.append(dataclasses.replace(spec.quantize(part, axis=axis), logical_dtype=str(weight.dtype)))
        return MixedRows(parts[0], parts[1], jnp.argsort(source, axis=-1).astype(jnp.int32), axis)


def _ordered(y: jax.Array, w: MixedRows) -> jax.Array:
    return jnp.take(y, w.order, axis=-1)


def _materialize(w: MixedRows) -> jax.Array:
    both = jnp.concatenate([ops.materialize(w.low), ops.materialize(w.high)], w.out_axis)
    order = w.order[..., None, :] if w.out_axis == -1 else w.order[..., None]
    return jnp.take_along_axis(both, order, w.out_axis)


def _split(x: jax.Array, w: MixedRows) -> tuple[jax.Array, jax.Array]:
    """x over the outputs as x over those of the two parts."""
    source = jnp.argsort(w.order)
    low, high = jnp.split(jnp.take(x, source, axis=-1), [w.low.shape[w.out_axis]], -1)
    return low, high


def _dot(x: jax.Array, w: MixedRows) -> jax.Array:
    if w.axis == -2:
        return _ordered(jnp.concatenate([ops.dot(x, w.low), ops.dot(x, w.high)], -1), w)
    low, high = _split(x, w)
    return ops.dot(low, w.low) + ops.dot(high, w.high)


def _dot_transposed(x: jax.Array, w: MixedRows) -> jax.Array:
    if w.axis == -1:
        return _ordered(jnp.concatenate([ops.dot_transposed(x, w.low), ops.dot_transposed(x, w.high)], -1), w)
    low, high = _split(x, w)
    return ops.dot_transposed(low, w.low) + ops.dot_transposed(high, w.high)


def _take(w: MixedRows, ids: jax.Array) -> jax.Array:
    if w.axis == -2:
        return _ordered(jnp.concatenate([ops.take(w.low, ids), ops.take(w.high, ids)], -1), w)
    at = w.order[jnp.clip(ids, 0, w.shape[0] - 1)]
    first = w.low.shape[0]
    low, high = ops.take(w.low, jnp.minimum(at, first - 1)), ops.take(w.high, at - first)
    return jnp.where((at < first)[..., None], low, high)


ops.register(MixedRows, ops.Rules(materialize=_materialize, dot=_dot, dot_transposed=_dot_transposed, take=_take))
