"""FlashFFTConv as a TPU kernel (Fu et al., 2023, arXiv 2311.05908): transform, filter and inverse without leaving VMEM.

A grid step takes one head and a packed pair of rows. With N = N1 N2 all six products are of matrices with at most 256
rows, in float32; the tables and the head's spectrum are fetched once for all pairs.

Stability: experimental.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.pallas_kernels.fftconv import monarch
from jaxinfer.pallas_kernels.fftconv.blocked import packed

Array = jax.Array


def refuses(call: Any) -> str | None:
    """Why no TPU kernel serves the call, or None."""
    if len(call.sizes) != 2:
        return f"the kernel is of order 2, the transform of order {len(call.sizes)}"
    if call.keep is not None:
        return "the kernel keeps all frequencies; impl='monarch' skips those dropped"
    if call.sizes[0] % 8 or call.sizes[1] % 8:
        return f"factors {call.sizes} are not multiples of 8, the rows of a tile"
    return None


def forward(x: Array, kernel: Array, sizes: tuple[int, int], *, interpret: bool) -> Array:
    """The first T entries of the circular convolution of length N = prod(sizes) of x [B, H, T], kernel [H, L], f32."""
    return filtered(x, jnp.fft.fft(kernel, sizes[0] * sizes[1]), sizes, interpret)


def backward(x: Array, kernel: Array, d_out: Array, sizes: tuple[int, int], *, interpret: bool) -> tuple[Array, Array]:
    """Gradients of x, by the same kernel, and of the filter, by `jnp.fft`: one inverse a head."""
    size = sizes[0] * sizes[1]
    dx = filtered(d_out, jnp.fft.fft(kernel, size).conj(), sizes, interpret)
    correlation = (jnp.fft.rfft(x, size).conj() * jnp.fft.rfft(d_out, size)).sum(0)
    return dx, jnp.fft.irfft(correlation, size)[..., : kernel.shape[-1]]


def filtered(x: Array, spectrum: Array, sizes: tuple[int, int], interpret: bool) -> Array:
    """x [B, H, T] times the spectrum, complex [H, N], of a real filter."""
    first, second = sizes
    # Rows of the first product beyond T are zeros and are left out, up to a tile of 8.
    real, imag = (a.reshape(*a.shape[:2], -1, second) for a in packed(x, 8 * second))
    rows = real.shape[2]
    tables = _tables(first, second, rows)
    digits = monarch.laid_out(spectrum, sizes, None) / (first * second)

    def step(*refs: Any) -> None:
        x_r, x_i, f_r, f_i, *tables, out_r, out_i = refs
        left, twiddle, right = ((tables[i][...], tables[i + 1][...]) for i in (0, 2, 4))
        z = monarch.times(_product(left, (x_r[...], x_i[...]), 1, 0), twiddle)
        z = monarch.times(_product(z, right, 1, 0), (f_r[...], f_i[...]))
        # Conjugate matrices: the transform's are symmetric, so contracting their first axis transposes them.
        z = monarch.times(_product(z, _conj(right), 1, 1), _conj(twiddle))
        out_r[...], out_i[...] = _product(_conj(left), z, 0, 0)

    pair = pl.BlockSpec((None, None, rows, second), lambda h, b: (b, h, 0, 0))
    of_head = pl.BlockSpec((None, first, second), lambda h, b: (h, 0, 0))
    shared = [pl.BlockSpec(t.shape, lambda h, b: (0, 0)) for t in tables]
    real, imag = pl.pallas_call(
        step,
        grid=(x.shape[1], real.shape[0]),
        in_specs=[pair, pair, of_head, of_head, *shared],
        out_specs=[pair, pair],
        out_shape=[jax.ShapeDtypeStruct(real.shape, jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(real, imag, digits.real, digits.imag, *tables)
    out = jnp.concatenate([real, imag])[: x.shape[0]]
    return out.reshape(*out.shape[:2], -1)[..., : x.shape[-1]]


def _tables(first: int, second: int, rows: int) -> list[np.ndarray]:
    """Real and imaginary parts of the first matrix [N1, rows], the twiddles [N1, N2] and the second [N2, N2]."""
    left, twiddle = monarch.tables(first * second, first, None)
    right, _ = monarch.tables(second, second, None)
    return [part(t) for t in (left[:, :rows], twiddle, right) for part in (np.real, np.imag)]


def _product(a: monarch.Pair, b: monarch.Pair, contract_a: int, contract_b: int) -> monarch.Pair:
    def dot(x: Array, y: Array) -> Array:
        numbers = (((contract_a,), (contract_b,)), ((), ()))
        return lax.dot_general(x, y, numbers, precision="highest", preferred_element_type=jnp.float32)

    return dot(a[0], b[0]) - dot(a[1], b[1]), dot(a[0], b[1]) + dot(a[1], b[0])


def _conj(x: monarch.Pair) -> monarch.Pair:
    return x[0], -x[1]
