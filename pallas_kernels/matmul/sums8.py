"""Sums of int8 by int8 into int32 over whole rows of a weight: what a CPU multiplies fastest.

Stability: internal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.matmul.elements import ELEMENTS, integer
from jaxinfer.pallas_kernels.matmul.weight import LowBit, piece, x_pieces

BY_ROWS = (((1,), (1,)), ((), ()))
FITTING = tuple(name for name, kind in ELEMENTS.items() if kind.kind == "int" or kind.top / kind.unit <= 127)
MOST_INPUTS = (2**31 - 1) // (127 * 128)  # whose sum int32 holds


def codes8(field: jax.Array, element: str) -> jax.Array:
    """Codes of an element of `FITTING`, `u8` fields or whole, as `i8` multiples of its unit."""
    kind = ELEMENTS[element]
    return field if kind.bits == 8 else integer(field, kind).astype(jnp.int8)


def row_sums(xq: jax.Array, w: LowBit) -> jax.Array:
    """`xq i8[M, K]` by the codes of N outputs: `i32[M, N]` in the element's units, scales and zeros left aside.

    Below 8 bits a piece is unpacked at a time. A single row gets a second one of zeros: alone it is slow.
    """
    m = xq.shape[0]
    cut = x_pieces(jnp.pad(xq, ((0, 1), (0, 0))) if m == 1 else xq, w)
    sums = jnp.zeros((cut.shape[1], w.outputs), jnp.int32)
    for index in range(w.pieces):
        codes = codes8(piece(w, index), w.element)
        sums += lax.dot_general(cut[index], codes, BY_ROWS, preferred_element_type=jnp.int32)
    return sums[:m]
