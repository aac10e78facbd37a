"""Long convolution in XLA: `monarch` by FlashFFTConv's products with small matrices, `fast` by `jnp.fft`.

Fu et al., 2023 (arXiv 2311.05908). Matrix units make up for the Monarch form's many more operations; a CPU does not:
there `fast` is the faster one, and is what the dispatch takes. A real row needs half of
its spectrum, as in `jnp.fft.rfft`: that of the first digits from 0 to N1 / 2.

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
    x_real, x_imag = monarch.real_transform(padded(x, sizes), sizes, keep)
    d_spectrum = monarch.real_transform(padded(d_out, sizes), sizes, keep)
    sums = tuple(a.sum(0) for a in monarch.times((x_real, -x_imag), d_spectrum))
    mask = _mask(sizes, keep)
    correlation = monarch.real_inverse((sums[0] * mask, sums[1] * mask), sizes, keep, kernel.shape[-1])
    return dx, correlation / size_of(sizes)


def forward_fast(x: Array, kernel: Array, sizes: Sizes, keep: Keep) -> Array:
    """As `forward_monarch`."""
    size = size_of(sizes)
    return _real_filtered(x, jnp.fft.rfft(kernel, size) * _half(sizes, keep), size)


def backward_fast(x: Array, kernel: Array, d_out: Array, sizes: Sizes, keep: Keep) -> tuple[Array, Array]:
    """As `backward_monarch`."""
    size = size_of(sizes)
    dx = _real_filtered(d_out, jnp.fft.rfft(kernel, size).conj() * _half(sizes, keep), size)
    return dx, kernel_gradient(x, d_out, kernel.shape[-1], sizes, keep)


def kernel_gradient(x: Array, d_out: Array, taps: int, sizes: Sizes, keep: Keep) -> Array:
    """[H, taps] by `jnp.fft`: two transforms a row, one inverse a head."""
    size = size_of(sizes)
    correlation = (jnp.fft.rfft(x, size).conj() * jnp.fft.rfft(d_out, size)).sum(0) * _half(sizes, keep)
    return jnp.fft.irfft(correlation, size)[..., :taps]


def padded(x: Array, sizes: Sizes) -> Array:
    """[B, H, T] with zeros up to whole rows of the first product."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % (size_of(sizes) // sizes[0]))))


def size_of(sizes: Sizes) -> int:
    """N."""
    return int(np.prod(sizes))


def _filtered(x: Array, spectrum: monarch.Pair, sizes: Sizes, keep: Keep) -> Array:
    z = monarch.times(monarch.real_transform(padded(x, sizes), sizes, keep), spectrum)
    return monarch.real_inverse(z, sizes, keep, x.shape[-1]) / size_of(sizes)


def _real_filtered(x: Array, spectrum: Array, size: int) -> Array:
    return jnp.fft.irfft(jnp.fft.rfft(x, size) * spectrum, size)[..., : x.shape[-1]]


def _spectrum(kernel: Array, sizes: Sizes, keep: Keep) -> monarch.Pair:
    """The kernel's spectrum [H, k1, k2, ...]; one transform a head, against B for the rows."""
    digits = monarch.laid_out(jnp.fft.fft(kernel, size_of(sizes)), sizes, keep, half=True)
    mask = _mask(sizes, keep)
    return digits.real * mask, digits.imag * mask


def _mask(sizes: Sizes, keep: Keep) -> Array:
    return monarch.laid_out(jnp.asarray(monarch.kept_frequencies(sizes, keep), jnp.float32), sizes, keep, half=True)


def _half(sizes: Sizes, keep: Keep) -> np.ndarray:
    return monarch.kept_frequencies(sizes, keep)[: size_of(sizes) // 2 + 1].astype(np.float32)
