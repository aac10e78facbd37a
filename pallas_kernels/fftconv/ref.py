"""Long convolution, naive: a sum over all shifts, or explicit Fourier sums where frequencies are dropped; the oracle.

What FlashFFTConv (Fu et al., 2023, arXiv 2311.05908) computes.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def convolve(x: Array, kernel: Array, size: int, kept: np.ndarray) -> Array:
    """The first T entries of the circular convolution of length `size` of x [B, H, T] and kernel [H, L], in f32.

    `kept` bool [size]: the frequencies of the kernel that stay.
    """
    length = x.shape[-1]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, size - length)))
    kernel = jnp.pad(kernel.astype(jnp.float32), ((0, 0), (0, size - kernel.shape[-1])))
    shift = (np.arange(size)[:, None] - np.arange(size)) % size
    if not kept.all():
        # The kernel without the frequencies dropped, by cosines: kept frequencies come in pairs k, -k.
        waves = np.cos(2 * np.pi * (np.arange(size)[:, None] * np.flatnonzero(kept) % size) / size)
        kernel = jnp.einsum("hs,ts->ht", kernel, (waves @ waves.T + _sines(size, kept)) / size, precision="highest")
    return jnp.einsum("bhs,hts->bht", x, kernel[:, shift], precision="highest")[..., :length]


def _sines(size: int, kept: np.ndarray) -> np.ndarray:
    waves = np.sin(2 * np.pi * (np.arange(size)[:, None] * np.flatnonzero(kept) % size) / size)
    return waves @ waves.T
