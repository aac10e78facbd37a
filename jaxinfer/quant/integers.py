"""Integer weights: 8, 4, 3 or 2 bits a code, round-to-nearest, symmetric or with zero points, per channel or grouped.

Symmetric: scale = absmax / (2^(bits-1) - 1), codes without the lowest one, ties to even; so `|w - materialize(q)| <=
scale / 2`. With zero points the range of a group, which is made to include zero, is cut into 2^bits - 1 steps and the
zero is one of them; zero points are stored as int8. Guarantee: approximate. State: none.
Sources: Dettmers et al. 2022, LLM.int8(), 2208.07339 (vector-wise absmax; here the weights alone are quantized, unless
`activations="int8"`); Frantar et al. 2022, GPTQ, 2210.17323 (the grid with zero points, here with round-to-nearest);
Zheng et al. 2024, MixPE, 2411.16158 (integer activations: dequantization after the sum over a group).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, nearest
from jaxinfer.pallas_kernels.matmul.weight import LowBit, make
from jaxinfer.quant.quantized import FLOATS, INT8_ACTIVATIONS, RowSpec, check_activations, check_group, groups_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers(RowSpec):
    """What the widths share. `group`: length of a group along the input axis, None for one scale per output channel.

    `symmetric`: no zero points. `scales`: their dtype. `activations`: "float"; or "int8" to round each row of the other
    operand to int8 as well and multiply integers; or "int8-group" to give each group of such a row its own scale.
    """

    group: int | None = None
    symmetric: bool = True
    scales: str = "float32"
    activations: str = "float"

    @property
    def element(self) -> str:
        """`Int4` makes int4."""
        return type(self).__name__.lower()

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        check_group(name, self.group)
        if self.scales not in FLOATS:
            raise ConfigError(f"{name}: scales must be one of {', '.join(FLOATS)}, got {self.scales!r}")
        check_activations(name, self.activations, INT8_ACTIVATIONS)

    def encode(self, rows: jax.Array) -> LowBit:
        """`rows f32[..., N, K]` as codes, scales and zeros."""
        groups = groups_of(type(self).__name__, rows.shape[-1], self.group, self.element)
        kind = ELEMENTS[self.element]
        x = rows.reshape(*rows.shape[:-1], groups, -1)
        if self.symmetric:
            scales, zeros = nonzero(jnp.abs(x).max(-1) / kind.top, self.scales), None
            codes = jnp.clip(jnp.round(x / scales[..., None]), -kind.top, kind.top)
        else:
            low, high = jnp.minimum(x.min(-1), 0), jnp.maximum(x.max(-1), 0)
            scales = nonzero((high - low) / (2**kind.bits - 1), self.scales)
            zeros = jnp.round(-low / scales) - 2 ** (kind.bits - 1)
            codes = jnp.round(x / scales[..., None]) + zeros[..., None]
            zeros = zeros.astype(jnp.int8)
        scales = scales.astype(self.scales)
        return make(nearest(codes, kind).reshape(rows.shape), scales, self.element, zeros=zeros)


def nonzero(scales: jax.Array, dtype: str) -> jax.Array:
    """Scales as `dtype` will hold them, in f32: 1 for an empty group, and none so small that it would be subnormal."""
    tiny = float(jnp.finfo(jnp.float32 if dtype == "bfloat16" else dtype).tiny)
    return jnp.where(scales == 0, 1, jnp.maximum(scales, tiny)).astype(dtype).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Integers):
    """8-bit weights, by default symmetric with one scale per output channel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Integers):
    """4-bit weights, by default with zero points in groups of 64."""

    group: int | None = 64
    symmetric: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int3(Integers):
    """3-bit weights, by default with zero points in groups of 64."""

    group: int | None = 64
    symmetric: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int2(Integers):
    """2-bit weights, by default with zero points in groups of 64."""

    group: int | None = 64
    symmetric: bool = False
