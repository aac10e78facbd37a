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
    return jnp.concatenate(halves(codes, channel_axis), channel_axis)


def halves(codes: Codes, channel_axis: int = -1) -> list[jax.Array]:
    """The numbers as they lie: all channels of 8-bit codes; the first and the second half of the channels of 4-bit."""
    if codes.bits == 8:
        parts = [codes.values]
    else:
        parts = list(unpack(codes.values))

    def constants(x: jax.Array) -> list[jax.Array]:
        if len(parts) == 1 or x.shape[channel_axis] == 1:
            return [_spread(x, parts[0].shape)] * len(parts)
        shape = list(parts[0].shape)
        shape[channel_axis] *= 2
        return jnp.split(_spread(x, tuple(shape)), 2, channel_axis)

    scaled = [part.astype(jnp.float32) * s for part, s in zip(parts, constants(codes.scale), strict=True)]
    if codes.offset is None:
        return scaled
    return [part + o for part, o in zip(scaled, constants(codes.offset), strict=True)]


def pack(values: jax.Array, channel_axis: int = -1) -> jax.Array:
    """Codes of -8 to 7 `[..., d]` as uint8 `[..., d/2]`: channel i low, channel i + d/2 high."""
    low, high = jnp.split(values.astype(jnp.int8).view(jnp.uint8), 2, axis=channel_axis)
    return (low & 15) | (high << 4)


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack`: int32 codes `[..., d/2]` of the first half of the channels, and of the second."""
    wide = packed.astype(jnp.int32)
    return ((wide & 15) ^ 8) - 8, ((wide >> 4) ^ 8) - 8


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
    if bits not in BITS:
        raise argument_error("quantize", "bits", bits, "8 or 4")
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
    constants = (*lead, height // rows, width // columns)
    return Codes(values, scale.reshape(constants), None if offset is None else offset.reshape(constants), bits)


def _spread(constants: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales or offsets, one for each element of the last two axes."""
    for axis in (-2, -1):
        group = shape[axis] // constants.shape[axis]
        if group > 1 and constants.shape[axis] > 1:
            constants = jnp.repeat(constants, group, axis)
    return constants
