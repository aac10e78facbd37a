"""Softmax beside jax.nn's, and long convolutions beside `jnp.fft`: no targets on a CPU, where neither paper claims any.

A GPU is asked to be no slower than `jnp.fft` with the Monarch products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.fftconv import fftconv
from jaxinfer.pallas_kernels.softmax import softmax

from .case import Case
from .linear import bound

SOFTMAX_SHAPES = [(1, 2**24), (64, 2**18), (4096, 4096)]  # the first two are out of any cache, a row alone
CONVOLUTIONS = [(4, 64, 1024), (4, 16, 4096), (2, 8, 16384), (2, 4, 65536)]


def cases() -> Iterator[Case]:
    for rows, length in SOFTMAX_SHAPES:
        for direction in ("forward", "forward+backward"):
            yield softmax_case(rows, length, direction)
    for batch, heads, length in CONVOLUTIONS:
        for direction in ("forward", "forward+backward"):
            yield convolution_case(batch, heads, length, direction)


def softmax_case(rows: int, length: int, direction: str) -> Case:
    x, cotangent = (jax.random.normal(key, (rows, length)) for key in jax.random.split(jax.random.key(0)))
    arrays = 3 if direction == "forward" else 6  # two reads and a write; then out, its cotangent, and the gradient
    return Case(
        op="softmax",
        shape=f"{rows}x{length}",
        dtype="float32",
        direction=direction,
        runs={
            "ours": bound(softmax, (x,), cotangent, direction),
            "jax.nn": bound(jax.nn.softmax, (x,), cotangent, direction),
        },
        flops=8 * rows * length,
        bytes=arrays * 4 * rows * length,
    )


def convolution_case(batch: int, heads: int, length: int, direction: str) -> Case:
    """A causal convolution with a kernel as long as the sequence."""
    keys = jax.random.split(jax.random.key(0), 3)
    u, cotangent = (jax.random.normal(key, (batch, heads, length)) for key in keys[:2])
    kernel = jax.random.normal(keys[2], (heads, length)) / length**0.5
    passes = 1 if direction == "forward" else 3

    def plain(u: jax.Array, kernel: jax.Array) -> jax.Array:
        size = 2 * length
        return jnp.fft.irfft(jnp.fft.rfft(u, size) * jnp.fft.rfft(kernel, size), size)[..., :length]

    on_gpu = jax.default_backend() == "gpu"
    return Case(
        op="fftconv",
        shape=f"{batch}x{heads}x{length} causal",
        dtype="float32",
        direction=direction,
        runs={
            "ours": bound(fftconv, (u, kernel), cotangent, direction),
            "monarch": bound(lambda u, k: fftconv(u, k, impl="monarch"), (u, kernel), cotangent, direction),
            "jnp.fft": bound(plain, (u, kernel), cotangent, direction),
        },
        # Two real transforms of 2 T points a row and one a head, 2.5 N log2 N each.
        flops=passes * (2 * batch + 1) * heads * 2.5 * 2 * length * math.log2(2 * length),
        bytes=passes * 4 * heads * length * (2 * batch + 1),
        targets={"jnp.fft": 1.0} if on_gpu else {},
    )
