"""The discrete Fourier transform as products with small matrices: the Monarch decomposition that FlashFFTConv runs on.

Fu et al., 2023 (arXiv 2311.05908), after Cooley and Tukey. With N = N1 M, time n = n1 M + m and frequency
k = k1 + N1 j,

    X[k1, j] = sum_m W_M^(m j) W_N^(m k1) sum_n1 W_N1^(n1 k1) x[n1, m],        W_N = exp(-2 pi i / N):

a product with the N1 x N1 matrix, a twiddle, and a transform of length M by the rest of the factors. Frequencies
come out in the order [k1, k2, ...] of their digits, which no one needs to undo: a spectrum is laid out alike once.

Stability: internal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
MOST = 256  # the largest matrix


def factors(size: int, order: int | None) -> tuple[int, ...] | None:
    """`order` factors of `size`, as equal as can be, or None; without an order 2, or 3 where 2 would be too large."""
    if order is None:
        return factors(size, 2) or factors(size, 3)
    if order == 1:
        return (size,) if size <= MOST else None
    target = round(size ** (1 / order))
    for first in sorted(range(1, min(size, MOST) + 1), key=lambda f: (abs(math.log(f / max(target, 1))), f)):
        if size % first == 0 and (rest := factors(size // first, order - 1)):
            return (first, *rest)
    return None


@functools.cache
def tables(size: int, first: int, keep: int | None, half: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """complex64 DFT matrix [k1, n1] and twiddles [k1, m] of the first stage; k1 as in `kept` or `halved`."""
    rest = size // first
    k1 = (halved if half else kept)(first, keep)[:, None]
    matrix = np.exp(-2j * np.pi * (k1 * np.arange(first) % first) / first)
    twiddle = np.exp(-2j * np.pi * (k1 * np.arange(rest) % size) / size)
    return matrix.astype(np.complex64), twiddle.astype(np.complex64)


def kept(size: int, keep: int | None) -> np.ndarray:
    """The `keep` digits nearest to 0 modulo `size`, or all."""
    if keep is None or keep >= size:
        return np.arange(size)
    return np.concatenate([np.arange((keep + 1) // 2), np.arange(size - keep // 2, size)])


def halved(size: int, keep: int | None) -> np.ndarray:
    """First digits of a real row's spectrum that are kept with their negatives, of which these are the conjugates."""
    return np.arange(size // 2 + 1 if keep is None or keep >= size else (keep + 1) // 2)


def weights(size: int, keep: int | None) -> np.ndarray:
    """How often each of `halved` stands in the whole spectrum: once where it is its own negative, else twice."""
    k1 = halved(size, keep)
    return np.where(2 * k1 % size == 0, 1.0, 2.0).astype(np.float32)


@functools.cache
def kept_frequencies(sizes: tuple[int, ...], keep: tuple[int, ...] | None) -> np.ndarray:
    """bool [N]: frequencies k in natural order whose digits are kept, and those of -k, so that the filter is real."""
    inside = np.ones((), bool)
    for size, most in zip(sizes, keep or sizes, strict=True):
        digit = np.isin(np.arange(size), kept(size, most))
        inside = inside[..., None] & digit
    natural = inside.transpose(*reversed(range(inside.ndim))).reshape(-1)
    return natural & np.roll(natural[::-1], 1)


def laid_out(spectrum: Array, sizes: tuple[int, ...], keep: tuple[int, ...] | None, half: bool = False) -> Array:
    """[.., N] in natural order -> [.., k1, k2, ...] by digits, those kept; `half`: the first ones `halved`."""
    lead = spectrum.ndim - 1
    digits = spectrum.reshape(*spectrum.shape[:-1], *reversed(sizes))
    digits = digits.transpose(*range(lead), *(lead + i for i in reversed(range(len(sizes)))))
    for axis, (size, most) in enumerate(zip(sizes, keep or sizes, strict=True)):
        taken = halved(size, most) if half and axis == 0 else kept(size, most)
        if len(taken) < size:
            digits = jnp.take(digits, taken, axis=lead + axis)
    return digits


Pair = tuple[Array, Array]  # real and imaginary parts


def transform(x: Pair, sizes: Sequence[int], keep: Sequence[int] | None) -> Pair:
    """[.., T], zeros beyond T up to N -> [.., k1, k2, ...]; T is a multiple of N / N1."""
    first, *rest = sizes
    keeps = list(keep or sizes)
    size, inner = math.prod(sizes), math.prod(rest)
    matrix, twiddle = tables(size, first, keeps[0])  # the zeros beyond T are not multiplied
    rows = x[0].shape[-1] // inner
    x = _map(lambda a: a.reshape(*a.shape[:-1], rows, inner), x)
    x = _product("kn,...nm->...km", matrix[:, :rows], x)
    if not rest:
        return _map(lambda a: a[..., 0], x)
    return transform(times(x, _pair(twiddle)), rest, keeps[1:])


def inverse(x: Pair, sizes: Sequence[int], keep: Sequence[int] | None, length: int) -> Pair:
    """[.., k1, k2, ...] -> the first `length` entries [.., length], unscaled: N times the inverse transform."""
    first, *rest = sizes
    keeps = list(keep or sizes)
    size, inner = math.prod(sizes), math.prod(rest)
    matrix, twiddle = tables(size, first, keeps[0])
    if rest:
        x = times(inverse(x, rest, keeps[1:], inner), _pair(twiddle.conj()))
    else:
        x = _map(lambda a: a[..., None], x)
    x = _product("nk,...km->...nm", matrix.conj().T[: -(-length // inner)], x)
    return _map(lambda a: a.reshape(*a.shape[:-2], -1)[..., :length], x)


def real_transform(x: Array, sizes: Sequence[int], keep: Sequence[int] | None) -> Pair:
    """`transform` of real numbers: the half of the spectrum whose first digits are `halved`.

    No two rows share a transform as real and imaginary part: their rounding, and a NaN, would meet.
    """
    first, *rest = sizes
    keeps = list(keep or sizes)
    size, inner = math.prod(sizes), math.prod(rest)
    matrix, twiddle = tables(size, first, keeps[0], True)
    x = x.reshape(*x.shape[:-1], x.shape[-1] // inner, inner)
    real, imag = (_dot("kn,...nm->...km", part[:, : x.shape[-2]], x) for part in _pair(matrix))
    return transform(times((real, imag), _pair(twiddle)), rest, keeps[1:])


def real_inverse(x: Pair, sizes: Sequence[int], keep: Sequence[int] | None, length: int) -> Array:
    """`inverse` of the half that `real_transform` gives."""
    first, *rest = sizes
    keeps = list(keep or sizes)
    size, inner = math.prod(sizes), math.prod(rest)
    matrix, twiddle = tables(size, first, keeps[0], True)
    real, imag = times(inverse(x, rest, keeps[1:], inner), _pair(twiddle.conj()))
    back = (matrix.T * weights(first, keeps[0]))[: -(-length // inner)]  # its conjugate's real part of the product
    out = _dot("nk,...km->...nm", np.real(back), real) + _dot("nk,...km->...nm", np.imag(back), imag)
    return out.reshape(*out.shape[:-2], -1)[..., :length]


def times(a: Pair, b: Pair) -> Pair:
    """The product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _product(rule: str, matrix: np.ndarray, x: Pair) -> Pair:
    real, imag = _pair(matrix)
    dot = functools.partial(_dot, rule)
    return dot(real, x[0]) - dot(imag, x[1]), dot(real, x[1]) + dot(imag, x[0])


def _dot(rule: str, a: Array | np.ndarray, b: Array) -> Array:
    return jnp.einsum(rule, jnp.asarray(a), b, precision="highest")


def _pair(table: np.ndarray) -> Pair:
    return jnp.asarray(np.real(table)), jnp.asarray(np.imag(table))


def _map(f, x: Pair) -> Pair:
    return f(x[0]), f(x[1])
