"""Bit layouts: where the bits of a code lie in bytes. Defined once, here.

Codes of 2, 3, 4 or 6 bits that share a scale form a group of g neighbours on the last axis, and a row of K codes is G
groups. A row is stored as planes of bytes; a plane holds some of the bits of every code:

    bits   planes             bytes of a row
    4      4                  K/2
    2      2                  K/4
    3      2 (low), 1 (high)  K/4 + K/8
    6      4 (low), 2 (high)  K/2 + K/4
    8      8                  K

The first plane has a width of b bits, and n = 8/b codes share a byte. Each group is cut into n equal parts, and the
byte at column c of the group holds column c of every part: bits b*j to b*j + b - 1, counted from the least
significant, belong to part j. For four bits: the low nibbles of a group are its first half, the high nibbles its second
half. So a plane unpacks with one shift and one mask into n contiguous arrays, nothing is interleaved, and a product
with the row is the sum of n products with parts of x. Groups are independent: an array of one plane may be cut
between groups (over devices too) and each piece is packed as it stands.

The second plane has half that width, w, and half as many bytes a row. Cut the first plane's row of C = K/n bytes in two
halves of columns; the byte at column c of the second plane completes columns c and C/2 + c of the first: its bits
2wj to 2wj + w - 1 belong to part j of the first half, the next w bits to part j of the second half. A row of several
groups must therefore have an even number of them.

A *piece* is what one shift and mask of every plane give: part j of the columns, or of one half of them.
`unpack` inverts `pack` for every code; `pieces` brings x into the order of `piece`.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core.errors import argument_error

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}


def per_byte(bits: int) -> int:
    """The codes that share a byte of the last plane, which is the number of pieces."""
    return 8 // PLANES[bits][-1]


def refuses(bits: int, group: int, size: int) -> str | None:
    """What a row of `size` codes in groups of `group` must be and is not, or None."""
    if bits not in PLANES:
        return f"bits of {', '.join(map(str, PLANES))}"
    parts, groups = 8 // PLANES[bits][0], size // max(group, 1)
    if group < 1 or size % group or group % parts:
        return f"groups that divide {size}, of a multiple of {parts} {bits}-bit codes"
    if len(PLANES[bits]) > 1 and (groups % 2 if groups > 1 else group % (2 * parts)):
        return f"for {bits} bits an even number of groups, or one of a multiple of {2 * parts}"
    return None


def pack(codes: jax.Array, bits: int, group: int) -> tuple[jax.Array, ...]:
    """`codes u8[..., K]`, each below 2**bits, as planes `u8[..., K * width / 8]`, the low bits first.

    Raises ArgumentError for bits, groups or a row that have no layout.
    """
    if why := refuses(bits, group, codes.shape[-1]):
        raise argument_error("packing", "group", f"{group} in a row of {codes.shape[-1]}", why)
    cut, planes, low = pieces(codes, bits, group), [], 0
    for width in PLANES[bits]:
        part = (cut >> low) & (2**width - 1)
        halves = per_byte(bits) * width // 8  # pieces side by side in this plane
        byte = [jnp.zeros(cut.shape[1:], jnp.uint8) for _ in range(halves)]
        for index in range(len(cut)):
            side, shift = index % halves, width * (index // halves)
            byte[side] = byte[side] | (part[index].astype(jnp.uint8) << shift)
        planes.append(jnp.concatenate(byte, -1))
        low += width
    return tuple(planes)


def unpack(planes: tuple[jax.Array, ...], bits: int, group: int) -> jax.Array:
    """The inverse of `pack`: `u8[..., K]`."""
    return join(jnp.stack([piece(planes, bits, index) for index in range(per_byte(bits))]), bits, group)


def piece(planes: tuple[jax.Array, ...], bits: int, index: int) -> jax.Array:
    """`pieces(codes)[index]` out of the planes, `u8[..., K / n]` for n pieces: contiguous slices, shifts and masks."""
    sides = []
    for plane, width in zip(planes, PLANES[bits], strict=True):
        halves = per_byte(bits) * width // 8
        columns = plane.shape[-1] // halves
        sides.append(plane[..., index % halves * columns :][..., :columns] if halves > 1 else plane)
    return field(tuple(sides), bits, index)


def field(sides: tuple[jax.Array, ...], bits: int, index: int) -> jax.Array:
    """The shifts and masks of `piece` for columns, of its half of every plane, that the caller has cut."""
    out, low = None, 0
    for side, width in zip(sides, PLANES[bits], strict=True):
        halves = per_byte(bits) * width // 8
        part = side if width == 8 else (side >> (width * (index // halves))) & (2**width - 1)
        out = part if out is None else out | (part << low)
        low += width
    assert out is not None
    return out


def pieces(x: jax.Array, bits: int, group: int) -> jax.Array:
    """`x[..., K]` as `[n, ..., K / n]`: what each piece holds. Products with codes are sums of products of pieces."""
    *lead, size = x.shape
    parts, halves = 8 // PLANES[bits][0], len(PLANES[bits])
    x = jnp.moveaxis(x.reshape(*lead, size // group, parts, group // parts), -2, 0)
    x = jnp.moveaxis(x.reshape(parts, *lead, halves, size // parts // halves), -2, 1)
    return x.reshape(parts * halves, *lead, -1)


def join(x: jax.Array, bits: int, group: int) -> jax.Array:
    """The inverse of `pieces`: `[n, ..., K / n]` as `[..., K]`."""
    count, *lead, columns = x.shape
    parts, halves = 8 // PLANES[bits][0], len(PLANES[bits])
    size = count * columns
    x = jnp.moveaxis(x.reshape(parts, halves, *lead, columns), 1, -2)
    x = jnp.moveaxis(x.reshape(parts, *lead, size // group, group // parts), 0, -2)
    return x.reshape(*lead, size)


def groups_of_piece(per_group: jax.Array, bits: int, index: int) -> jax.Array:
    """Of `[..., G]`, something a group, what belongs to piece `index`: all, or one half where pieces are halves."""
    halves, groups = len(PLANES[bits]), per_group.shape[-1]
    if halves == 1 or groups == 1:
        return per_group
    return per_group[..., index % halves * (groups // halves) :][..., : groups // halves]


def signed(field: jax.Array, bits: int) -> jax.Array:
    """Two's complement of `bits` bits: `u8` below 2**bits as `i8`."""
    whole = jax.lax.bitcast_convert_type(field, jnp.int8)
    return whole if bits == 8 else (whole ^ 2 ** (bits - 1)) - 2 ** (bits - 1)


def unsigned(values: jax.Array, bits: int) -> jax.Array:
    """The inverse of `signed`: integers of `bits` bits as `u8`."""
    return (values.astype(jnp.int32) & (2**bits - 1)).astype(jnp.uint8)
