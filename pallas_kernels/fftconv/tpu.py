"""FlashFFTConv as a TPU kernel (Fu et al., 2023, arXiv 2311.05908): transform, filter and inverse without leaving VMEM.

A grid step takes a row of a head: two products, real by complex, with half of the first digits, and two complex ones,
in float32; the tables and the head's spectrum are fetched once for all rows of the batch. A third factor would be
smaller than the 128 x 128 of a matrix unit, which takes as long for it: N goes as two factors of up to MOST, whatever
the order asked for. Frequencies dropped are rows and columns that the tables do not have.

Stability: experimental.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels.fftconv import monarch
from jaxinfer.pallas_kernels.fftconv.blocked import kernel_gradient, padded, size_of

Array = jax.Array
Sizes = tuple[int, ...]
Keep = tuple[int, ...] | None
MOST = 1024  # the largest factor: tables of 2 x 4 MB, in a VMEM of 128
LANES = 128
VMEM_BYTES = 96 << 20


def two_factors(size: int) -> tuple[int, int] | None:
    """Factors of N, the second a multiple of the lanes where that can be, as equal as can be."""
    pairs = [(size // n, n) for n in range(1, MOST + 1) if size % n == 0 and size // n <= MOST]
    return min(pairs, key=lambda p: (p[1] % LANES != 0, max(p) / min(p)), default=None)


def refuses(call: Any) -> str | None:
    """Why no TPU kernel serves the call, or None."""
    size = size_of(call.sizes)
    if call.keep is not None and size // call.sizes[0] > MOST:
        return (
            f"digits kept of {call.sizes}: all after the first are one factor, of {size // call.sizes[0]} over {MOST}"
        )
    if call.keep is None and two_factors(size) is None:
        return f"a transform of {size} is no product of two factors of at most {MOST}"
    return None


def forward(x: Array, kernel: Array, sizes: Sizes, keep: Keep, *, interpret: bool) -> Array:
    """The first T entries of the circular convolution of length N = prod(sizes) of x [B, H, T], kernel [H, L], f32."""
    return filtered(x, jnp.fft.fft(kernel, size_of(sizes)), sizes, keep, interpret)


def backward(
    x: Array, kernel: Array, d_out: Array, sizes: Sizes, keep: Keep, *, interpret: bool
) -> tuple[Array, Array]:
    """Gradients of x, by the same kernel, and of the filter, by `jnp.fft`: one inverse a head."""
    dx = filtered(d_out, jnp.fft.fft(kernel, size_of(sizes)).conj(), sizes, keep, interpret)
    return dx, kernel_gradient(x, d_out, kernel.shape[-1], sizes, keep)


def filtered(x: Array, spectrum: Array, sizes: Sizes, keep: Keep, interpret: bool) -> Array:
    """x [B, H, T] times the spectrum, complex [H, N], of a real filter."""
    size, length = size_of(sizes), x.shape[-1]
    if keep is None:
        sizes = two_factors(size) or sizes
    second = size // sizes[0]
    rows = padded(x, (sizes[0], second))
    rows = rows.reshape(*x.shape[:2], -1, second)  # rows of the first product beyond T are zeros and are left out
    tables = _tables(sizes, keep, rows.shape[2])
    digits = monarch.laid_out(spectrum * monarch.kept_frequencies(sizes, keep), sizes, keep, half=True)
    digits = digits.reshape(*digits.shape[:2], -1) * (
        monarch.weights(sizes[0], keep[0] if keep else None)[:, None] / size
    )

    def step(x_ref: Any, f_r: Any, f_i: Any, *refs: Any) -> None:
        *tables, out = refs
        left, twiddle, right = ((tables[i][...], tables[i + 1][...]) for i in (0, 2, 4))
        z = monarch.times((_dot(left[0], x_ref[...], 1, 0), _dot(left[1], x_ref[...], 1, 0)), twiddle)
        z = monarch.times(_product(z, right, 1, 0), (f_r[...], f_i[...]))
        # Conjugate matrices, contracted over what they were made for.
        z = monarch.times(_product(z, _conj(right), 1, 1), _conj(twiddle))
        out[...] = _dot(left[0], z[0], 0, 0) + _dot(left[1], z[1], 0, 0)

    row = pl.BlockSpec((None, None, rows.shape[2], second), lambda h, b: (b, h, 0, 0))
    of_head = pl.BlockSpec((None, *digits.shape[1:]), lambda h, b: (h, 0, 0))
    out = pl.pallas_call(
        step,
        grid=(x.shape[1], x.shape[0]),
        in_specs=[row, of_head, of_head, *(pl.BlockSpec(t.shape, lambda h, b: (0, 0)) for t in tables)],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(rows, digits.real, digits.imag, *tables)
    return out.reshape(*x.shape[:2], -1)[..., :length]


def _tables(sizes: Sizes, keep: Keep, rows: int) -> list[np.ndarray]:
    """Real and imaginary parts of the first matrix [K1, rows], the twiddles [K1, M] and the second [M, J], M = N / N1.

    J: what is kept of the digits after the first, in the order of `monarch.laid_out`.
    """
    size, second = size_of(sizes), size_of(sizes[1:])
    left, twiddle = monarch.tables(size, sizes[0], keep[0] if keep else None, True)
    kept, stride = np.zeros(1, int), 1
    for at, part in enumerate(sizes[1:], 1):
        kept = (kept[:, None] + stride * monarch.kept(part, keep[at] if keep else None)).reshape(-1)
        stride *= part
    right = np.exp(-2j * np.pi * (np.arange(second)[:, None] * kept % second) / second).astype(np.complex64)
    return [part(t) for t in (left[:, :rows], twiddle, right) for part in (np.real, np.imag)]


def _dot(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    numbers = (((contract_a,), (contract_b,)), ((), ()))
    return lax.dot_general(a, b, numbers, precision="highest", preferred_element_type=jnp.float32)


def _product(a: monarch.Pair, b: monarch.Pair, contract_a: int, contract_b: int) -> monarch.Pair:
    dot = functools.partial(_dot, contract_a=contract_a, contract_b=contract_b)
    return dot(a[0], b[0]) - dot(a[1], b[1]), dot(a[0], b[1]) + dot(a[1], b[0])


def _conj(x: monarch.Pair) -> monarch.Pair:
    return x[0], -x[1]
