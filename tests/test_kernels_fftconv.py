"""Long convolutions: both transforms are the sum over all shifts, causal, circular, gated, partial and sparse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.fftconv import fftconv, gpu, monarch, tpu, transform_sizes
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


CASES = {
    "causal": (60, {}),
    "order 3": (33, {"order": 3}),
    "partial": (9, {}),  # pieces of 32
    "one tap": (1, {}),
    "circular": (60, {"causal": False}),
    "circular sparse": (60, {"causal": False, "order": 3, "keep": (2, 3, 2)}),
    "sparse": (45, {"keep": (5, 6)}),
}


@functools.cache
def oracle(name):
    """`both` in float64: a matrix of shifts a head, its frequencies dropped by numpy's transform."""
    taps, options = CASES[name]
    u, kernel, pre, post, d_out = (np.asarray(x, np.float64) for x in inputs(taps))
    chosen = {key: options[key] for key in options if key != "keep"}
    sizes = transform_sizes(T, taps, **chosen)
    exact_size = "keep" in options or "causal" in options
    size = int(np.prod(sizes)) if exact_size else 2 * T
    kept = monarch.kept_frequencies(sizes, options.get("keep")) if exact_size else np.ones(size)

    def filtered(k):
        return np.fft.ifft(np.fft.fft(k, size) * kept).real

    shift = (np.arange(T)[:, None] - np.arange(T)) % size
    matrix = filtered(kernel)[:, shift]
    x, dy = u * pre, d_out * post
    y, dx = np.einsum("hts,bhs->bht", matrix, x), np.einsum("hts,bht->bhs", matrix, dy)
    of_pairs = np.einsum("bht,bhs->hts", dy, x)
    d_kernel = np.stack([np.bincount(shift.reshape(-1), of_head.reshape(-1), size) for of_head in of_pairs])
    return y * post, (dx * pre, filtered(d_kernel)[:, :taps], dx * u, d_out * y)


@pytest.mark.smoke
@settings(max_examples=7, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(CASES)), st.sampled_from(["fft", "monarch"]))
def test_is_the_sum_over_shifts(name, impl):
    taps, options = CASES[name]
    checks.assert_close(both(*inputs(taps), impl=impl, **options), oracle(name))


@pytest.mark.parametrize("impl", ["fft", "monarch"])
def test_rows_do_not_meet(impl):
    """A row's bits are the same beside a huge row, and beside NaN."""
    u, kernel, *_ = inputs(60)
    run = jax.jit(functools.partial(fftconv, impl=impl))
    alone = run(u, kernel)[0]
    for other in (1e30, jnp.nan):
        np.testing.assert_array_equal(run(u.at[1:].set(other), kernel)[0], alone)


@pytest.mark.parametrize("name", ["circular sparse", "partial"])
def test_the_reference(name):
    taps, options = CASES[name]
    checks.assert_close(both(*inputs(taps), impl="ref", **options), oracle(name))


def test_bfloat16():
    given = inputs(60, "bfloat16")
    got = both(*given)[0]
    assert got.dtype == jnp.bfloat16
    checks.assert_close(got, both(*(x.astype(jnp.float32) for x in given), impl="fft")[0], "bfloat16")


@pytest.mark.parametrize("sizes", [(8, 4), (3, 5, 4)])
def test_monarch_is_the_transform(sizes):
    """Laid out by digits, it is numpy's FFT; the inverse takes it back."""
    size = int(np.prod(sizes))
    x = checks.normal(3, (2, size))[0]
    got = jax.jit(lambda x: monarch.real_transform(x, sizes, None))(x)
    want = np.asarray(
        monarch.laid_out(jnp.asarray(np.fft.fft(np.asarray(x)).astype(np.complex64)), sizes, None, half=True)
    )
    checks.assert_close(got, (np.real(want), np.imag(want)))
    checks.assert_close(jax.jit(lambda z: monarch.real_inverse(z, sizes, None, size))(got) / size, x)


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

    def untwiddled(size, first, keep, half=False):
        matrix, twiddle = tables(size, first, keep, half)
        return matrix, np.ones_like(twiddle)

    monkeypatch.setattr(monarch, "tables", untwiddled)
    u, kernel, *_ = inputs(60)
    got = jax.jit(lambda u, kernel: fftconv(u, kernel, impl="monarch"))(u, kernel)
    assert checks.error(got, fftconv(u, kernel)) > 0.1


@pytest.mark.parametrize("name", ["order 3", "sparse", "circular sparse"])
def test_tpu_kernel_interpreted(name):
    """Forward and gradients; a factor of three goes as two, and frequencies dropped are no rows and columns."""
    taps, options = CASES[name]
    checks.assert_close(both(*inputs(taps), impl="tpu", interpret=True, **options), oracle(name))


@pytest.mark.parametrize(
    ("size", "factors"), [(2048, (16, 128)), (2**15, (256, 128)), (2**18, (512, 512)), (36, (6, 6))]
)
def test_factors_on_a_tpu(size, factors):
    assert tpu.two_factors(size) == factors


@checks.needs_mosaic_gpu
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_kernel_interpreted(causal):
    """Four heads in a tile, two rows of very different size, zeros at the end of the causal ones; and gradients."""
    shape = (2, 4, 1000 if causal else 1024)
    given = [(x.at[1].mul(1e6)) for x in checks.normal(6, shape, shape, dtype="bfloat16")]
    kernel = checks.normal(7, shape[1:])[0]

    @functools.partial(jax.jit, static_argnames=("impl", "interpret"))
    def run(u, d_out, **form):
        out, pull = jax.vjp(lambda u, k: fftconv(u, k, causal=causal, **form), u, kernel)
        return out, *pull(d_out)

    for got, want in zip(run(*given, impl="gpu", interpret=True), run(*given, impl="fft"), strict=True):
        for a, b in zip(got, want, strict=True):  # a row, or the kernel's head, at a time
            checks.assert_close(a, b, "bfloat16", factor=0.5)


@checks.needs_mosaic_gpu
def test_planted_bug_in_gpu_kernel_is_caught(monkeypatch):
    """The second half of a circle that is not added back."""
    tables = gpu.tables
    monkeypatch.setattr(gpu, "tables", lambda of, fold: tables(of, 0))
    u, kernel = checks.normal(8, (1, 4, 1024), dtype="bfloat16")[0], checks.normal(9, (4, 1024))[0]
    got = fftconv(u, kernel, causal=False, impl="gpu", interpret=True)
    assert checks.error(got, fftconv(u, kernel, causal=False)) > 0.1


PRODUCTION = {
    "8x16x16384 order 3": ((8, 16, 16384), {"order": 3}),
    "8x16x4096 sparse": ((8, 16, 4096), {"keep": (32, 64)}),
}


def forward_and_backward(impl, **options):
    def run(u, kernel):
        out, pull = jax.vjp(functools.partial(fftconv, impl=impl, **options), u, kernel)
        return out, pull(out)

    return run


def production(name):
    """Forward and backward on a TPU, and its arguments."""
    shape, options = PRODUCTION[name]
    arguments = (*checks.avals(shape), *checks.avals(shape[1:], dtype="float32"))
    return forward_and_backward("tpu", **options), arguments


@pytest.mark.smoke
@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_tpu_kernel_lowers(name):
    run, arguments = production(name)
    checks.assert_lowers(run, *arguments, platform="tpu", calls=2)


@checks.needs_target("v5e")
@pytest.mark.parametrize("name", sorted(PRODUCTION))
def test_tpu_kernel_compiles(name):
    run, arguments = production(name)
    build = targets.compile_for(run, *arguments, target="v5e")
    checks.assert_within_budget("fftconv", name, build)


GPU = {"64x768x1024": (64, 768, 1024), "64x768x4096": (64, 768, 4096)}


@checks.needs_mosaic_gpu
def test_gpu_kernel_lowers():
    shape = GPU["64x768x1024"]
    arguments = (*checks.avals(shape), *checks.avals(shape[1:], dtype="float32"))
    checks.assert_lowers(forward_and_backward("gpu"), *arguments, platform="cuda", calls=2)


@checks.needs_target("h200")
@pytest.mark.parametrize("name", sorted(GPU))
def test_gpu_kernel_compiles(name):
    arguments = (*checks.avals(GPU[name]), *checks.avals(GPU[name][1:], dtype="float32"))
    build = targets.compile_for(functools.partial(fftconv, impl="gpu"), *arguments, target="h200")
    checks.assert_within_budget("fftconv", name, build)


def test_form_that_cannot_serve_says_why():
    u, kernel = checks.avals((1, 1, 2**20), (1, 2**20), dtype="float32")
    with pytest.raises(UnsupportedError, match="a transform of 2097152 is no product of two factors of at most 1024"):
        jax.eval_shape(functools.partial(fftconv, impl="tpu"), u, kernel)


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
