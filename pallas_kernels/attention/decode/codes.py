"""Quantized caches: int8 or int4 codes with a scale, and if wanted an offset, for each group of the last two axes.

A group is any rectangle of tokens and channels: one scale per token (`[B, G, C, 1]`), per channel over groups of g
tokens (`[B, G, C/g, d]`, KIVI's keys: Liu et al. 2024, arXiv 2402.02750), per token over groups of channels
(`[B, G, C, d/g]`), per head (`[B, G, 1, 1]`). Keys stored transposed, `[B, G, d, C]`, have their scales transposed too.

Four-bit codes lie two in a byte, split in halves along the channels: byte i holds channel i in its low four bits and
channel i + d/2 in its high four, both in two's complement. A product with the low halves and one with the high halves
then give the whole without interleaving, which neither a TPU nor a tensor core likes.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error

BITS = (8, 4)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scale", "offset"), meta_fields=("bits",))
@dataclasses.dataclass(frozen=True)
class Codes:
    """`x = code * scale + offset`. `values`: int8 codes, or uint8 pairs of 4-bit codes, `[B, G, C, d or d/2]`.

    `scale` and `offset` (or None): float32 `[B, G, c, e]` where c divides C and e divides d. Keys may be transposed.
    """

    values: jax.Array
    scale: jax.Array
    offset: jax.Array | None = None
    bits: int = 8


def numbers(codes: Codes, channel_axis: int = -1) -> jax.Array:
    """The float32 numbers that codes stand for; `channel_axis` is -1, or -2 of transposed keys."""
    values = codes.values if codes.bits == 8 else unpack(codes.values, channel_axis)
    scale = _spread(codes.scale, values.shape)
    x = values.astype(jnp.float32) * scale
    return x if codes.offset is None else x + _spread(codes.offset, values.shape)


def pack(values: jax.Array, channel_axis: int = -1) -> jax.Array:
    """Codes of -8 to 7 `[..., d]` as uint8 `[..., d/2]`: channel i low, channel i + d/2 high."""
    low, high = jnp.split(values.astype(jnp.int8).view(jnp.uint8), 2, axis=channel_axis)
    return (low & 15) | (high << 4)


def unpack(packed: jax.Array, channel_axis: int = -1) -> jax.Array:
    """The inverse of `pack`: int8 codes `[..., d]`."""
    signed = packed.view(jnp.int8)
    return jnp.concatenate([(signed << 4) >> 4, signed >> 4], axis=channel_axis)


def quantize(
    x: jax.Array,
    *,
    bits: int = 8,
    tokens: int = 1,
    channels: int | None = None,
    symmetric: bool = False,
    transposed: bool = False,
) -> Codes:
    """Round-to-nearest codes of a cache `x[B, G, C, d]` in groups of `tokens` by `channels` (None: all of them).

    `symmetric`: no offset, codes -(2^(bits-1) - 1) to 2^(bits-1) - 1; otherwise the groups' ranges are cut into
    2^bits - 1 steps. `transposed`: `x` and the codes are `[B, G, d, C]`. A constant group is exact with an offset.
    Raises ArgumentError for groups that do not divide the axes.
    """
    check.choice("quantize", "bits", bits, {b: None for b in BITS})
    axes = (-1, -2) if transposed else (-2, -1)
    sizes = {"tokens": (tokens, x.shape[axes[0]]), "channels": (channels or x.shape[axes[1]], x.shape[axes[1]])}
    for name, (group, size) in sizes.items():
        if group < 1 or size % group:
            raise argument_error("quantize", name, group, f"a divisor of {size}")
    groups = [sizes["tokens"][0], sizes["channels"][0]]
    rows, columns = groups[::-1] if transposed else groups
    *lead, height, width = x.shape
    tiles = x.astype(jnp.float32).reshape(*lead, height // rows, rows, width // columns, columns)
    low, high = tiles.min((-3, -1), keepdims=True), tiles.max((-3, -1), keepdims=True)
    top = 2 ** (bits - 1)
    if symmetric:
        scale, offset = jnp.maximum(-low, high) / (top - 1), None
        code = jnp.round(tiles / jnp.where(scale > 0, scale, 1.0))
    else:
        scale = (high - low) / (2 * top - 1)
        offset = low + top * scale
        code = jnp.clip(jnp.round((tiles - low) / jnp.where(scale > 0, scale, 1.0)) - top, -top, top - 1)
    values = code.astype(jnp.int8).reshape(x.shape)
    values = pack(values, axes[1]) if bits == 4 else values
    squeeze = [None if c is None else c.reshape(*lead, height // rows, width // columns) for c in (scale, offset)]
    return Codes(values, squeeze[0], squeeze[1], bits)


def _spread(constants: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales or offsets, one for each element of the last two axes."""
    for axis in (-2, -1):
        group = shape[axis] // constants.shape[axis]
        if group > 1 and constants.shape[axis] > 1:
            constants = jnp.repeat(constants, group, axis)
    return constants
