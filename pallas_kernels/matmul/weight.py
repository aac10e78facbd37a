"""A weight in few bits, as arrays: what every product of this folder takes.

A weight of `K` inputs and `N` outputs stands row by row, the inputs of one output next to each other, as
`(code - zero) * scale` with one scale (and zero) for a group of neighbouring inputs:

    codes    planes of `_core/packing.py`: [N, K] for 8 bits, [N, K/2] for 4, [N, K/4] for 2
    high     the second plane of 3 bits [N, K/8] and of 6 bits [N, K/4], else None
    scales   [N, G] for G groups; or [N/r, G] where r rows share a scale, in blocks. Floats; float8; or uint8 that are
             exponents, 2**(byte - 127) (E8M0; byte 0 counts as 1, whose power the CPU does not flush; 255 is NaN)
    zeros    int8, in the range of the codes, [N, G], or None for a symmetric grid
    factor   float32 [1, 1] over all scales, or None

Leading axes (layers, experts) come before these in every array.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels._core import check, packing
from jaxinfer.pallas_kernels._core.errors import argument_error
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, Element, float8, value


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales", "zeros", "high", "factor"),
    meta_fields=("element",),
)
@dataclasses.dataclass(frozen=True)
class LowBit:
    """The arrays of one weight; `element` names what a code stands for, a key of `elements.ELEMENTS`."""

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None
    high: jax.Array | None = None
    factor: jax.Array | None = None
    element: str = "int8"

    @property
    def kind(self) -> Element:
        """The element's description."""
        return ELEMENTS[self.element]

    @property
    def outputs(self) -> int:
        """N."""
        return self.codes.shape[-2]

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[-1] * 8 // packing.PLANES[self.kind.bits][0]

    @property
    def groups(self) -> int:
        """G: 1 for one scale per output."""
        return self.scales.shape[-1]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.groups

    @property
    def planes(self) -> tuple[jax.Array, ...]:
        """The planes of codes, the low bits first."""
        return (self.codes,) if self.high is None else (self.codes, self.high)

    @property
    def pieces(self) -> int:
        """Into how many pieces `piece` cuts the inputs."""
        return packing.per_byte(self.kind.bits)


def make(values_or_fields: jax.Array, scales: jax.Array, element: str, *, zeros=None, factor=None) -> LowBit:
    """A weight of codes `[..., N, K]` (whole codes, or `u8` fields below 8 bits), packed for the groups of `scales`."""
    kind, size = ELEMENTS[element], values_or_fields.shape[-1]
    if kind.bits == 8:
        return LowBit(values_or_fields, scales, zeros, None, factor, element)
    planes = packing.pack(values_or_fields, kind.bits, size // scales.shape[-1])
    return LowBit(planes[0], scales, zeros, planes[1] if len(planes) > 1 else None, factor, element)


def float_scales(w: LowBit) -> jax.Array:
    """`f32[..., N, G]`: scales decoded, spread over their rows, times `factor`."""
    s = w.scales
    if s.dtype == jnp.uint8:
        power = lax.bitcast_convert_type(jnp.maximum(s, 1).astype(jnp.uint32) << 23, jnp.float32)
        s = jnp.where(s == 255, jnp.nan, power)
    else:
        s = float8(s) if s.dtype.itemsize == 1 else s.astype(jnp.float32)
    if s.shape[-2] != w.outputs:
        s = jnp.repeat(s, w.outputs // s.shape[-2], -2)
    return s if w.factor is None else s * w.factor


def fields(w: LowBit) -> jax.Array:
    """Codes `[..., N, K]` in the order of the inputs: whole codes, or `u8` fields below 8 bits."""
    return w.codes if w.kind.bits == 8 else packing.unpack(w.planes, w.kind.bits, w.group)


def dequantize(w: LowBit) -> jax.Array:
    """`f32[..., N, K]`: the definition."""
    x = value(fields(w), w.kind)
    x = x.reshape(*x.shape[:-1], w.groups, w.group)
    if w.zeros is not None:
        x = x - w.zeros.astype(jnp.float32)[..., None]
    x = x * float_scales(w)[..., None]
    return x.reshape(*x.shape[:-2], -1)


def piece(w: LowBit, index: int) -> jax.Array:
    """Codes of piece `index`, `[..., N, K / pieces]`: the inputs that `x_pieces(...)[index]` holds."""
    return w.codes if w.kind.bits == 8 else packing.piece(w.planes, w.kind.bits, index)


def x_pieces(x: jax.Array, w: LowBit) -> jax.Array:
    """`x[..., K]` as `[pieces, ..., K / pieces]`, in the order of `piece`."""
    return packing.pieces(x, w.kind.bits, w.group)


def of_piece(per_group: jax.Array, w: LowBit, index: int) -> jax.Array:
    """`[..., G]`, scales or zeros, as those of the groups that piece `index` holds."""
    return packing.groups_of_piece(per_group, w.kind.bits, index)


def contradiction(w: LowBit) -> tuple[str, str, str] | None:
    """(array, what it is, what it must be) of the first array that does not fit the others, or None."""
    kind, codes, scales = w.kind, tuple(w.codes.shape), tuple(w.scales.shape)
    if len(codes) < 2 or min(codes) < 1 or str(w.codes.dtype) != kind.stored:
        return "codes", f"{w.codes.dtype}{list(codes)}", f"{kind.stored}[..., N, K * bits / 8]"
    lead, n, k = codes[:-2], w.outputs, w.inputs
    if len(scales) != len(codes) or scales[:-2] != lead or min(scales) < 1 or n % scales[-2] or k % scales[-1]:
        return "scales", f"{list(scales)}", f"{[*lead, n, 'G']} with G that divides {k}, or fewer rows that divide {n}"
    if why := packing.refuses(kind.bits, w.group, k):
        return "scales", f"{list(scales)}, groups of {w.group}", why
    floats = jnp.issubdtype(w.scales.dtype, jnp.floating)
    if not floats and w.scales.dtype != jnp.uint8:
        return "scales", str(w.scales.dtype), "floats or uint8"
    if w.zeros is not None and tuple(w.zeros.shape) != (*lead, n, w.groups):
        return "zeros", f"{list(w.zeros.shape)}", f"{[*lead, n, w.groups]}"
    if w.zeros is not None and (w.zeros.dtype != jnp.int8 or kind.kind != "int"):
        return "zeros", f"{w.zeros.dtype} for {w.element}", "int8, for integers"
    planes = packing.PLANES[kind.bits]
    high = None if len(planes) == 1 else (*lead, n, k * planes[1] // 8)
    if (None if w.high is None else (tuple(w.high.shape), str(w.high.dtype))) != (high and (high, "uint8")):
        got = "None" if w.high is None else f"{w.high.dtype}{list(w.high.shape)}"
        return "high", got, "None" if high is None else f"uint8{list(high)}"
    if w.factor is not None and (tuple(w.factor.shape) != (*lead, 1, 1) or w.factor.dtype != jnp.float32):
        return "factor", f"{w.factor.dtype}{list(w.factor.shape)}", f"float32{[*lead, 1, 1]}"
    return None


def check_product(op: str, x: jax.Array, w: LowBit) -> None:
    """Raise ArgumentError unless `x[M, K]` floats can meet the matrix `w`."""
    check.choice(op, "element", w.element, ELEMENTS)
    if wrong := contradiction(w):
        raise argument_error(op, *wrong)
    check.shapes(op, x=(x, f"M {w.inputs}"), codes=(w.codes, f"N {w.codes.shape[-1]}"))
    check.dtypes(op, x=x)
