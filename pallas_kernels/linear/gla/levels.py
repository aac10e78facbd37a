"""Scores under per-channel gates as matrix products, with decays only ever multiplied, never divided.

The paper's factored form (q exp(b)) (k exp(-b))^T overflows, b being a sum of logarithms of gates. Its secondary
chunking subtracts sums from a nearer reference, and has a slow diagonal. Here the halving goes all the way down. At
the level of h = 1, 2, 4, ..., C/2, blocks of 2h tokens: a token i of a block's second half sees a token j of its first
half through the boundary between them,

    scores_ij = sum_d (q_i prefix_i)_d (k_j suffix_j)_d,

prefix the product of the gates from the boundary to i (inclusive), suffix that from j (exclusive) to the boundary.
Each pair i > j meets at exactly one level, the diagonal is q_i k_i, and the products of blocks of 2h follow from those
of blocks of h. Every factor is in [0, 1]: what underflows is truly negligible, and one exponential a gate is all.

Stability: internal.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def levels(gate: Array, size: int) -> Iterator[tuple[int, Array, Array]]:
    """(h, prefix, suffix) for h = 1, 2, ..., size: the products within aligned blocks of h tokens of gate [.., C, K].

    The last, h = size, are the products over the whole: into a chunk of `size`, and out of it.
    """
    prefix, suffix, h = gate, jnp.ones_like(gate), 1
    while True:
        yield h, prefix, suffix
        if h == size:
            return
        first, second = halves(prefix, h)
        total, next_total = first[..., -1:, :], second[..., -1:, :]
        prefix = from_halves(first, second * total)
        first, second = halves(suffix, h)
        suffix = from_halves(first * next_total, second)
        h *= 2


def halves(x: Array, h: int) -> tuple[Array, Array]:
    """x [.., C, d] in blocks of 2h: their first and second halves, each [.., C / 2h, h, d]."""
    x = x.reshape(*x.shape[:-2], -1, 2, h, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def from_halves(first: Array, second: Array) -> Array:
    """The inverse of `halves`."""
    x = jnp.stack([first, second], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def pairs(size: int, h: int) -> np.ndarray:
    """Which (i, j) of `size` tokens meet at level h: bool [size, size]."""
    row, column = np.arange(size)[:, None], np.arange(size)
    return (row // (2 * h) == column // (2 * h)) & second(size, h) & ~second(size, h).T


def second(size: int, h: int) -> np.ndarray:
    """Which tokens are in the second half of their block of 2h: bool [size, 1]."""
    return np.arange(size)[:, None] // h % 2 == 1
