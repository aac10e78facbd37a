"""The leaf of every format that is codes times scales: integers, minifloats and float8, grouped, with or without zeros.

`QuantizedArray` is what the specs of `integers.py`, `floats.py` and `ternary.py` make. Its products never build the
dense weight: they are `pallas_kernels/matmul`. The bits are laid out as `pallas_kernels/_core/packing.py` says.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.pallas_kernels._core.packing import refuses
from jaxinfer.pallas_kernels.matmul.acts8 import float8_matmul, int8_matmul
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS
from jaxinfer.pallas_kernels.matmul.lowbit import lowbit_matmul, lowbit_matmul_across
from jaxinfer.pallas_kernels.matmul.weight import LowBit, contradiction, dequantize

FLOATS = ("float32", "bfloat16", "float16")
INT8_ACTIVATIONS = ("float", "int8", "int8-group")
FLOAT8_ACTIVATIONS = ("float", "float8", "float8-group")
FEW_PAIRS = 64  # with at most so many token-expert pairs, experts are multiplied one by one and idle ones not at all


@struct.dataclass
class QuantizedArray:
    """`(codes - zeros) * scales * factor`, stored output by output whatever the logical orientation.

    `axis` is the logical axis that a product sums over: -2 for kernels `[..., K, N]`, -1 for embedding tables
    `[..., N, K]`. Stored are `codes [..., N, K * bits / 8]`, `scales [..., N, G]` for G groups along K (`[..., N/r, G]`
    where r rows share one), and where the format has them `zeros i8[..., N, G]`, a second plane of codes `high`, and
    `factor f32[..., 1, 1]`. `element` says what a code is; `activations`, what products make of x: "float" leaves it,
    "int8" rounds each row to int8, "int8-group" each group of a row; for float8 codes they are "float8" and
    "float8-group", which round to e4m3. Shapes come from the arrays, so leading axes may be scanned or mapped away.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    high: jax.Array | None = None
    factor: jax.Array | None = None
    element: str = struct.field(pytree_node=False, default="int8")
    axis: int = struct.field(pytree_node=False, default=-2)
    logical_dtype: str = struct.field(pytree_node=False, default="float32")
    activations: str = struct.field(pytree_node=False, default="float")

    @property
    def rows(self) -> LowBit:
        """The arrays as the kernels take them, an output a row."""
        return LowBit(self.codes, self.scales, self.zeros, self.high, self.factor, self.element)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        *lead, n, _ = self.codes.shape
        k = self.rows.inputs
        return (*lead, n, k) if self.axis == -1 else (*lead, k, n)

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
        return self.scales.shape[-1]

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> QuantizedArray:
        """The same leaf with logical axis names in place of arrays.

        Every shard holds whole groups: a single group is not an axis to split, codes of one packed plane are split
        between groups, and those of two planes not at all along the inputs.
        """
        *lead, first, second = logical_axes
        n, k = (first, second) if self.axis == -1 else (second, first)
        along = k if self.groups > 1 and self.high is None else None
        codes = (*lead, n, k if along or ELEMENTS[self.element].bits == 8 else None)
        of_groups = (*lead, n, along)
        return dataclasses.replace(
            self,
            codes=codes,
            scales=of_groups if self.scales.shape[-2] > 1 else (*lead, None, along),
            zeros=None if self.zeros is None else of_groups,
            high=None if self.high is None else codes,
            factor=None if self.factor is None else (*lead, None, None),
        )

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        if self.element not in ELEMENTS:
            raise InputError(f"element must be one of {', '.join(ELEMENTS)}, got {self.element!r}")
        if wrong := contradiction(self.rows):
            raise InputError(f"{wrong[0]} must be {wrong[2]}, got {wrong[1]}")
        if self.axis not in (-1, -2):
            raise InputError(f"input axis must be -1 or -2, got axis {self.axis}")
        if self.logical_dtype not in FLOATS:
            raise InputError(f"logical_dtype must be one of {', '.join(FLOATS)}, got {self.logical_dtype!r}")
        accepted = FLOAT8_ACTIVATIONS if ELEMENTS[self.element].kind == "float8" else INT8_ACTIVATIONS
        if self.activations not in accepted:
            names = ", ".join(accepted)
            raise InputError(f"activations of {self.element} must be one of {names}, got {self.activations!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
    """What the specs of `QuantizedArray` share: the checks, and the weight turned output by output for `encode`.

    `axis`: the input axis, None for what the caller says (`quant.apply`: -1 for embedding tables, -2 for the rest).
    """

    axis: int | None = None

    def __post_init__(self):
        if self.axis not in (None, -1, -2):
            raise ConfigError(f"{type(self).__name__}: axis must be -1, -2 or None, got {self.axis!r}")

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` in this format."""
        raise NotImplementedError

    def quantize(self, weight: Any, *, axis: int = -2) -> QuantizedArray:
        """Quantize `weight[..., K, N]` (or `[..., N, K]` with `axis=-1`), a float array, to the nearest codes.

        Raises ConfigError where the format does not fit the shape, InputError for what is no float matrix or (outside
        jit) holds values that are not finite.
        """
        axis, name = axis if self.axis is None else self.axis, type(self).__name__
        rows = checked_rows(name, weight, axis)
        out = _encode(self, rows)
        scales = out.scales if out.factor is None else out.factor
        if not is_finite(scales):
            raise InputError(f"the weight holds values that are not finite, or too large for {scales.dtype} scales")
        return QuantizedArray(
            *(out.codes, out.scales, out.zeros, out.high, out.factor, out.element, axis, str(weight.dtype)),
            activations=getattr(self, "activations", "float"),
        )


def checked_rows(name: str, weight: Any, axis: int) -> jax.Array:
    """`weight` output by output, `f32[..., N, K]`."""
    if len(weight.shape) < 2 or str(weight.dtype) not in FLOATS:
        raise InputError(f"{name} quantizes {', '.join(FLOATS)} matrices, got {weight.dtype}{list(weight.shape)}")
    if 0 in weight.shape:
        raise ConfigError(f"{name}: the weight {tuple(weight.shape)} holds nothing")
    rows = jnp.asarray(weight, jnp.float32)
    return rows if axis == -1 else jnp.swapaxes(rows, -1, -2)


def groups_of(name: str, size: int, group: int | None, element: str) -> int:
    """How many groups of `group` (None: all) cut `size` inputs; ConfigError for lengths that the layout refuses."""
    group = size if group is None else group
    if size % group:
        raise ConfigError(f"{name}: group {group} does not divide the input axis of {size}")
    if why := refuses(ELEMENTS[element].bits, group, size):
        raise ConfigError(f"{name}: groups of {group} along an input axis of {size} have no layout, which takes {why}")
    return size // group


def check_group(name: str, group: Any, *, optional: bool = True) -> None:
    """ConfigError for a group that is no positive integer."""
    if not (optional and group is None) and (type(group) is not int or group < 1):
        raise ConfigError(f"{name}: group must be {'None or ' * optional}a positive integer, got {group!r}")


def check_activations(name: str, activations: str, accepted: tuple[str, ...]) -> None:
    """ConfigError for a way of rounding activations that the format has not."""
    if activations not in accepted:
        raise ConfigError(f"{name}: activations must be one of {', '.join(accepted)}, got {activations!r}")


def is_finite(scales: jax.Array) -> bool:
    """Whether all scales are finite, as far as can be seen: exponents (uint8) are unless they are 255, tracers pass."""
    if isinstance(scales, Tracer):
        return True
    if scales.dtype == jnp.uint8:
        return not bool((scales == 255).any())
    return bool(jnp.isfinite(scales.astype(jnp.float32)).all())


def _encode(spec: RowSpec, rows: jax.Array) -> LowBit:
    return jax.jit(type(spec).encode, static_argnums=0)(spec, rows)


def _materialize(w: QuantizedArray) -> jax.Array:
    dense = dequantize(w.rows).astype(w.dtype)
    return dense if w.axis == -1 else jnp.swapaxes(dense, -1, -2)


def _product(x: jax.Array, w: QuantizedArray, contract: int) -> jax.Array:
    """Sum `x[..., K]` with axis `contract` (-1 or -2) of the matrix `w`."""
    *lead, size = x.shape
    flat = x.reshape(-1, size)
    if contract != w.axis:
        y = lowbit_matmul_across(flat, w.rows)
    elif w.activations != "float":
        product = int8_matmul if w.activations in INT8_ACTIVATIONS else float8_matmul
        y = product(flat, w.rows, per_group=w.activations.endswith("-group"))
    else:
        y = lowbit_matmul(flat, w.rows)
    return y.reshape(*lead, y.shape[-1])


def _take(w: QuantizedArray, ids: jax.Array) -> jax.Array:
    ids = jnp.clip(ids, 0, w.shape[0] - 1)
    if w.axis == -2:
        return jnp.take(_materialize(w), ids, axis=0)
    flat, each = ids.reshape(-1), w.codes.shape[0] // w.scales.shape[0]
    zeros, high = (None if x is None else x[flat] for x in (w.zeros, w.high))
    picked = LowBit(w.codes[flat], w.scales[flat // each], zeros, high, w.factor, w.element)
    return dequantize(picked).astype(w.dtype).reshape(*ids.shape, w.shape[1])


def _ragged_dot(x: jax.Array, w: QuantizedArray, group_sizes: jax.Array) -> jax.Array:
    """Experts one by one where the rows are few, so that one dense expert at most exists; else the dense form."""
    if x.shape[0] > FEW_PAIRS:
        return lax.ragged_dot(x, _materialize(w).astype(x.dtype), group_sizes)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]

    def expert(y, inputs):
        one, first, last = inputs
        mine = (row >= first) & (row < last)
        return lax.cond(first < last, lambda: jnp.where(mine, _product(x, one, -2), y), lambda: y), None

    start = jnp.zeros((x.shape[0], w.shape[-1]), x.dtype)
    return lax.scan(expert, start, (w, ends - group_sizes, ends))[0]


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
