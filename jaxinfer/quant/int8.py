"""Int8 weights: symmetric round-to-nearest with one scale per output channel, or per group along the input axis.

The grid is the symmetric one without the lowest code (`sym7` of the literature at four bits): scale = absmax / 127,
codes -127 to 127, ties to even; so `|w - materialize(q)| <= scale / 2`. Guarantee: approximate. State: none.
Source: Dettmers et al. 2022, LLM.int8(), 2208.07339 (vector-wise absmax; here the weights alone are quantized).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError

SCALE_DTYPES = ("float32", "bfloat16", "float16")


@struct.dataclass
class QuantizedArray:
    """`codes i8[..., K, N]` times `scales`, which has G groups in place of the axis that a product sums over.

    `axis` is that input axis: -2 for kernels `[in, out]` (scales `[..., G, N]`), -1 for embedding tables `[V, D]`
    (scales `[V, G]`). Shapes come from the arrays, so a leading layer axis may be scanned or mapped away.
    """

    codes: jax.Array
    scales: jax.Array
    axis: int = struct.field(pytree_node=False, default=-2)
    logical_dtype: str = struct.field(pytree_node=False, default="float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.codes.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the weight that this stands for."""
        return jnp.dtype(self.logical_dtype)

    @property
    def groups(self) -> int:
        """Scales along the input axis: 1 for per-channel."""
        return self.scales.shape[self.axis]

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> QuantizedArray:
        """The same leaf with logical axis names in place of arrays; a single group is not an axis to shard."""
        scales = list(logical_axes)
        if self.groups == 1:
            scales[self.axis] = None
        return dataclasses.replace(self, codes=tuple(logical_axes), scales=tuple(scales))

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        codes, scales = tuple(self.codes.shape), tuple(self.scales.shape)
        fits = self.axis in (-1, -2) and len(codes) >= 2 and len(scales) == len(codes)
        if fits:
            groups = scales[self.axis]
            expected = list(codes)
            expected[self.axis] = groups
            fits = groups > 0 and codes[self.axis] % groups == 0 and scales == tuple(expected)
        if not fits:
            raise InputError(f"codes {codes} and scales {scales} do not fit together with input axis {self.axis}")
        if self.codes.dtype != jnp.int8 or not jnp.issubdtype(self.scales.dtype, jnp.floating):
            raise InputError(f"codes must be int8 and scales float, got {self.codes.dtype} and {self.scales.dtype}")
        if self.logical_dtype not in SCALE_DTYPES:
            raise InputError(f"logical_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.logical_dtype!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """How a weight becomes a `QuantizedArray`.

    `group`: length of a group along the input axis, None for one scale per output channel. `axis`: the input axis,
    None for what the caller says (`quant.apply`: -1 for embedding tables, -2 for the rest). `scales`: their dtype.
    `bits`: how many of each stored byte's bits the codes use; below 8 it shows a narrower grid's error, not its size.
    """

    bits: int = 8
    group: int | None = None
    axis: int | None = None
    scales: str = "float32"

    def __post_init__(self):
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ConfigError(f"Int8: bits must be 2 to 8, got {self.bits!r}")
        if self.group is not None and (type(self.group) is not int or self.group < 1):
            raise ConfigError(f"Int8: group must be None or a positive integer, got {self.group!r}")
        if self.axis not in (None, -1, -2):
            raise ConfigError(f"Int8: axis must be -1, -2 or None, got {self.axis!r}")
        if self.scales not in SCALE_DTYPES:
            raise ConfigError(f"Int8: scales must be one of {', '.join(SCALE_DTYPES)}, got {self.scales!r}")

    def quantize(self, weight: Any, *, axis: int = -2) -> QuantizedArray:
        """Quantize `weight[..., K, N]`, a float array.

        Raises ConfigError when the group does not divide the input axis, InputError for what is no float matrix or
        (outside jit) holds values that are not finite.
        """
        if len(weight.shape) < 2 or str(weight.dtype) not in SCALE_DTYPES:
            kinds = ", ".join(SCALE_DTYPES)
            raise InputError(f"Int8 quantizes {kinds} matrices, got {weight.dtype}{list(weight.shape)}")
        axis = axis if self.axis is None else self.axis
        size = weight.shape[axis]
        group = size if self.group is None else self.group
        if size == 0 or size % group:
            raise ConfigError(f"Int8: group {group} does not divide the input axis of {tuple(weight.shape)}: {size}")
        codes, scales = _round(weight, 2 ** (self.bits - 1) - 1, size // group, axis, self.scales)
        if not isinstance(scales, Tracer) and not bool(jnp.isfinite(scales).all()):
            raise InputError(f"the weight holds values that are not finite, or too large for {self.scales} scales")
        return QuantizedArray(codes, scales, axis, str(weight.dtype))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _round(weight, top: int, groups: int, axis: int, dtype: str):
    blocks, inner = _split(weight.astype(jnp.float32), groups, axis)
    scales = (jnp.abs(blocks).max(inner, keepdims=True) / top).astype(dtype)
    # Codes are fitted to the scale as it is stored; an all-zero group, or one whose scale underflows, gets codes 0.
    stored = scales.astype(jnp.float32)
    usable = jnp.abs(stored) >= jnp.finfo(jnp.float32).tiny
    codes = jnp.where(usable, jnp.round(blocks / jnp.where(usable, stored, 1.0)), 0.0)
    codes = jnp.clip(codes, -top, top).astype(jnp.int8).reshape(weight.shape)
    return codes, scales.squeeze(inner)


def _split(x: jax.Array, groups: int, axis: int) -> tuple[jax.Array, int]:
    """`x` with its input axis cut into `[groups, length]`, and the index of the `length` axis."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :]), at + 1


def _materialize(w: QuantizedArray) -> jax.Array:
    blocks, inner = _split(w.codes.astype(jnp.float32), w.groups, w.axis)
    return (blocks * jnp.expand_dims(w.scales.astype(jnp.float32), inner)).astype(w.dtype).reshape(w.shape)


def _product(x: jax.Array, w: QuantizedArray, contract: int) -> jax.Array:
    """Sum `x[..., K]` with axis `contract` (-1 or -2) of `w[*, *]`. Codes meet x; scales meet the smaller side.

    Scales that run along the output multiply the product, scales along the sum multiply x. Grouped scales vary along
    the sum within a channel: those go through the dense form.
    """
    if w.groups > 1:
        dense = _materialize(w).astype(x.dtype)
        return lax.dot_general(x, dense, (((x.ndim - 1,), (2 + contract,)), ((), ())))
    scales = w.scales.squeeze(w.axis)
    if contract != w.axis:
        x = (x * scales).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    contracting = (((x.ndim - 1,), (2 + contract,)), ((), ()))
    y = lax.dot_general(x, w.codes.astype(x.dtype), contracting, preferred_element_type=wide)
    return (y * scales if contract == w.axis else y).astype(x.dtype)


def _take(w: QuantizedArray, ids: jax.Array) -> jax.Array:
    ids = jnp.clip(ids, 0, w.shape[0] - 1)
    if w.axis == -1:
        return _materialize(dataclasses.replace(w, codes=w.codes[ids], scales=w.scales[ids]))
    scales = w.scales[ids // (w.shape[0] // w.groups)]
    return (w.codes[ids].astype(jnp.float32) * scales.astype(jnp.float32)).astype(w.dtype)


def _ragged_dot(x: jax.Array, w: QuantizedArray, group_sizes: jax.Array) -> jax.Array:
    if w.groups > 1:
        return lax.ragged_dot(x, _materialize(w).astype(x.dtype), group_sizes)
    expert = jnp.repeat(jnp.arange(w.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    scales = w.scales.squeeze(w.axis)[expert]
    if w.axis == -1:
        x = (x * scales).astype(x.dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = lax.ragged_dot(x, w.codes.astype(x.dtype), group_sizes, preferred_element_type=wide)
    return (y * scales if w.axis == -2 else y).astype(x.dtype)


ops.register(
    QuantizedArray,
    ops.Rules(
        materialize=_materialize,
        dot=lambda x, w: _product(x, w, -2),
        dot_transposed=lambda x, w: _product(x, w, -1),
        take=_take,
        ragged_dot=_ragged_dot,
    ),
)
