"""Long convolutions: both transforms are the sum over all shifts, causal, circular, gated, partial and sparse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.fftconv import fftconv, monarch, transform_sizes
from tests import kernel_checks as checks

B, H, T = 3, 2, 60


@functools.partial(jax.jit, static_argnames=("impl", "causal", "keep", "order", "interpret"))
def both(u, kernel, pre, post, d_out, **options):
    out, pull = jax.vjp(lambda u, kernel, pre, post: fftconv(u, kernel, pre=pre, post=post, **options),
                        u, kernel, pre, post)  # fmt: skip
    return out, pull(d_out)


@functools.cache
def inputs(taps, dtype="float32"):
    u, pre, post, d_out = checks.normal(0, *[(B, H, T)] * 4, dtype=dtype)
    return u, checks.normal(1, (H, taps))[0], pre, post, d_out


@pytest.mark.parametrize("impl", ["fft", pytest.param("monarch", marks=pytest.mark.smoke)])
@pytest.mark.parametrize(
    ("taps", "options"),
    [
        (60, {}),
        (33, {"order": 3}),
        (9, {}),  # partial: pieces of 32
        (60, {"causal": False}),
        (60, {"causal": False, "order": 3, "keep": (2, 3, 2)}),
        (45, {"keep": (5, 6)}),
    ],
    ids=["causal", "order 3", "partial", "circular", "circular sparse", "sparse"],
)
def test_is_the_sum_over_shifts(impl, taps, options):
    checks.assert_close(both(*inputs(taps), impl=impl, **options), both(*inputs(taps), impl="ref", **options))


def test_against_numpy():
    """The reference itself, against numpy's direct convolution."""
    u, kernel, pre, post, _ = (np.asarray(x) for x in inputs(60))
    want = [[post[b, h] * np.convolve(pre[b, h] * u[b, h], kernel[h])[:T] for h in range(H)] for b in range(B)]
    checks.assert_close(fftconv(u, jnp.asarray(kernel), pre=pre, post=post, impl="ref"), np.array(want))


def test_bfloat16():
    u, kernel, pre, post, _ = inputs(60, "bfloat16")
    got = fftconv(u, kernel, pre=pre, post=post)
    assert got.dtype == jnp.bfloat16
    checks.assert_close(got, fftconv(u, kernel, pre=pre, post=post, impl="ref"), "bfloat16")


@pytest.mark.parametrize("sizes", [(8, 4), (3, 5, 4)])
def test_monarch_is_the_transform(sizes):
    """Laid out by digits, it is numpy's FFT; the inverse takes it back."""
    size = int(np.prod(sizes))
    real, imag = checks.normal(3, (2, size), (2, size))
    got = monarch.transform((real, imag), sizes, None)
    want = monarch.laid_out(jnp.asarray(np.fft.fft(np.asarray(real) + 1j * np.asarray(imag))), sizes, None)
    checks.assert_close(got, (want.real, want.imag))
    back = monarch.inverse(got, sizes, None, size)
    checks.assert_close(tuple(x / size for x in back), (real, imag))


@pytest.mark.parametrize("length", [1024, 4096, 16384, 65536])
def test_factors_of_production_lengths(length):
    sizes = transform_sizes(length, length)
    assert np.prod(sizes) == 2 * length and max(sizes) <= monarch.MOST


def test_kept_frequencies():
    """Symmetric, and everything where everything is kept."""
    kept = monarch.kept_frequencies((4, 8), (2, 4))
    assert 0 < kept.sum() < 32 and (kept[1:] == kept[:0:-1]).all()
    assert monarch.kept_frequencies((4, 8), (4, 8)).all()


def test_planted_bug_is_caught(monkeypatch):
    """Without the twiddles between stages the products are no transform."""
    tables = monarch.tables

    def untwiddled(size, first, keep):
        matrix, twiddle = tables(size, first, keep)
        return matrix, np.ones_like(twiddle)

    monkeypatch.setattr(monarch, "tables", untwiddled)
    u, kernel, *_ = inputs(60)
    assert checks.error(fftconv(u, kernel, impl="monarch"), fftconv(u, kernel, impl="ref")) > 0.1


def test_tpu_kernel_interpreted():
    """Three rows, so a pair and one alone; forward and gradients."""
    u, pre, post, d_out = checks.normal(4, *[(3, 1, 4000)] * 4)
    kernel = checks.normal(5, (1, 4000))[0] / 60
    arguments = (u, kernel, pre, post, d_out)
    assert transform_sizes(4000, 4000) == (128, 64)
    checks.assert_close(both(*arguments, impl="tpu", interpret=True), both(*arguments, impl="fft"))


def production():
    def run(u, kernel):
        out, pull = jax.vjp(functools.partial(fftconv, impl="tpu"), u, kernel)
        return out, pull(out)

    return run, (*checks.avals((8, 16, 16384)), *checks.avals((16, 16384), dtype="float32"))


@pytest.mark.smoke
def test_tpu_kernel_lowers():
    run, arguments = production()
    checks.assert_lowers(run, *arguments, platform="tpu", calls=2)


@checks.needs_target("v5e")
def test_tpu_kernel_compiles():
    run, arguments = production()
    build = targets.compile_for(run, *arguments, target="v5e")
    checks.assert_within_budget("fftconv", "8x16x16384 forward+backward", build)


def test_form_that_cannot_serve_says_why():
    u, kernel, *_ = inputs(60)
    with pytest.raises(UnsupportedError, match="impl='tpu' cannot serve this call: the kernel is of order 2"):
        fftconv(u, kernel, order=3, impl="tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": jnp.zeros((B, T))}, r"u: got \[3, 60\], accepts an array \[B, H, T\]"),
        ({"kernel": jnp.zeros((H + 1, T))}, r"kernel: got \[3, 60\].*H = 2"),
        ({"kernel": jnp.zeros((H, T + 1))}, r"kernel: got \[2, 61\], accepts .*T = 60"),
        ({"kernel": jnp.zeros((H, T), jnp.bfloat16)}, "kernel: got bfloat16, accepts float32"),
        ({"pre": jnp.zeros((B, H, T), jnp.bfloat16)}, "pre: got bfloat16, accepts the dtype of u"),
        ({"post": jnp.zeros((B, H, T + 1))}, r"post: got \[3, 2, 61\]"),
        ({"order": 4}, "order: got 4, accepts 2, 3 or None"),
        ({"keep": (3,)}, r"keep: got \(3,\), accepts integers from 1 to each of the factors \(8, 16\)"),
        ({"u": jnp.zeros((B, H, 521)), "causal": False}, "T: got 521"),
        ({"impl": "blocked"}, "impl: got 'blocked', accepts"),
    ],
)
def test_bad_input(change, message):
    u, kernel, *_ = inputs(60)
    with pytest.raises(ArgumentError, match=message):
        fftconv(**{"u": u, "kernel": kernel} | change)
