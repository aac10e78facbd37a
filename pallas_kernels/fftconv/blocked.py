"""Long convolution in XLA: `monarch` by FlashFFTConv's products with small matrices, `fast` by `jnp.fft`.

Fu et al., 2023 (arXiv 2311.05908). Matrix units make up for the Monarch form's many more operations; a CPU does not:
there `fast` is 1.4 to 4 times faster from 1K to 64K tokens, and is what the dispatch takes. Two rows of a batch go as
the real and imaginary part of one: the kernel is real, so the parts of the result are the two results and nothing has
to be taken apart.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.fftconv import monarch

Array = jax.Array
Sizes = tuple[int, ...]
Keep = tuple[int, ...] | None


def forward_monarch(x: Array, kernel: Array, sizes: Sizes, keep: Keep) -> Array:
    """The first T entries of the circular convolution of length N = prod(sizes) of x [B, H, T], kernel [H, L], f32."""
    return _filtered(x, _spectrum(kernel, sizes, keep), sizes, keep)


def backward_monarch(x: Array, kernel: Array, d_out: Array, sizes: Sizes, keep: Keep) -> tuple[Array, Array]:
    """Gradients of x and kernel."""
    real, imag = _spectrum(kernel, sizes, keep)
    dx = _filtered(d_out, (real, -imag), sizes, keep)
    # Of the packed rows' correlation the real part is the sum of the rows' own: the rest is imaginary.
    x_real, x_imag = monarch.transform(packed(x, _stride(sizes)), sizes, keep)
    d_spectrum = monarch.transform(packed(d_out, _stride(sizes)), sizes, keep)
    sums = tuple(a.sum(0) for a in monarch.times((x_real, -x_imag), d_spectrum))
    mask = _mask(sizes, keep)
    correlation, _ = monarch.inverse((sums[0] * mask, sums[1] * mask), sizes, keep, kernel.shape[-1])
    return dx, correlation / size_of(sizes)


def forward_fast(x: Array, kernel: Array, sizes: Sizes, keep: Keep) -> Array:
    """As `forward_monarch`."""
    size = size_of(sizes)
    return _real_filtered(x, jnp.fft.rfft(kernel, size) * _half(sizes, keep), size)


def backward_fast(x: Array, kernel: Array, d_out: Array, sizes: Sizes, keep: Keep) -> tuple[Array, Array]:
    """As `backward_monarch`."""
    size = size_of(sizes)
    half = _half(sizes, keep)
    dx = _real_filtered(d_out, jnp.fft.rfft(kernel, size).conj() * half, size)
    correlation = (jnp.fft.rfft(x, size).conj() * jnp.fft.rfft(d_out, size)).sum(0) * half
    return dx, jnp.fft.irfft(correlation, size)[..., : kernel.shape[-1]]


def packed(x: Array, stride: int) -> monarch.Pair:
    """[B, H, T] -> two halves of the batch [B / 2, H, T], zeros added to an odd batch and to a multiple of `stride`."""
    x = jnp.pad(x, ((0, x.shape[0] % 2), (0, 0), (0, -x.shape[-1] % stride)))
    return x[: x.shape[0] // 2], x[x.shape[0] // 2 :]


def size_of(sizes: Sizes) -> int:
    """N."""
    return int(np.prod(sizes))


def _filtered(x: Array, spectrum: monarch.Pair, sizes: Sizes, keep: Keep) -> Array:
    z = monarch.times(monarch.transform(packed(x, _stride(sizes)), sizes, keep), spectrum)
    real, imag = monarch.inverse(z, sizes, keep, x.shape[-1])
    return jnp.concatenate([real, imag])[: x.shape[0]] / size_of(sizes)


def _real_filtered(x: Array, spectrum: Array, size: int) -> Array:
    return jnp.fft.irfft(jnp.fft.rfft(x, size) * spectrum, size)[..., : x.shape[-1]]


def _spectrum(kernel: Array, sizes: Sizes, keep: Keep) -> monarch.Pair:
    """The kernel's spectrum [H, k1, k2, ...]; one transform a head, against B for the rows."""
    digits = monarch.laid_out(jnp.fft.fft(kernel, size_of(sizes)), sizes, keep)
    mask = _mask(sizes, keep)
    return digits.real * mask, digits.imag * mask


def _mask(sizes: Sizes, keep: Keep) -> Array:
    return monarch.laid_out(jnp.asarray(monarch.kept_frequencies(sizes, keep), jnp.float32), sizes, keep)


def _half(sizes: Sizes, keep: Keep) -> np.ndarray:
    return monarch.kept_frequencies(sizes, keep)[: size_of(sizes) // 2 + 1].astype(np.float32)


def _stride(sizes: Sizes) -> int:
    return int(np.prod(sizes[1:]))
