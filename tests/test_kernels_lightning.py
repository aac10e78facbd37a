"""Lightning attention: every form is the recurrence, for every chunk, length, state and decay; gradients too."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.linear import chunked
from jaxinfer.pallas_kernels.linear.lightning import lightning, lightning_step
from jaxinfer.pallas_kernels.linear.lightning.ref import parallel
from tests import kernel_checks as checks

B, H, T, K, V = 2, 3, 75, 16, 8
DECAY = -jnp.array([0.0, 0.05, 50.0])
LENGTHS = jnp.array([T, 41])


@functools.cache
def inputs(dtype="float32"):
    q, k, v, d_out = checks.normal(0, *((B, H, T, d) for d in (K, K, V, V)), dtype=dtype)
    state, d_state = checks.normal(1, (B, H, K, V), (B, H, K, V))
    return (q, k, v, DECAY, state), (d_out, d_state)


@functools.partial(jax.jit, static_argnames=("impl", "block", "interpret"))
def both(primals, cotangents, impl, block=None, interpret=False):
    """Outputs and gradients, with ragged lengths, an initial state and a scale."""

    def run(q, k, v, log_decay, state):
        options = {"impl": impl, "block": block, "interpret": interpret, "scale": 0.5}
        return lightning(q, k, v, log_decay, state=state, lengths=LENGTHS, **options)

    out, pull = jax.vjp(run, *primals)
    return out, pull(cotangents)


@functools.cache
def expected(dtype="float32"):
    return both(*inputs(dtype), "ref")


@pytest.mark.parametrize("block", [1, 7, 16, 128, pytest.param(None, marks=pytest.mark.smoke)])
def test_blocked_is_the_recurrence(block):
    """Chunks of one token, chunks that do not divide the length, and one chunk that is longer than it."""
    checks.assert_close(both(*inputs(), "blocked", block), expected())


def test_blocked_in_bfloat16():
    checks.assert_close(both(*inputs("bfloat16"), "blocked"), expected("bfloat16"), "bfloat16")


def test_parallel_form_agrees():
    (q, k, v, log_decay, _), _ = inputs()
    checks.assert_close(lightning(q, k, v, log_decay)[0], parallel(q, k, v, log_decay, scale=1.0))


def test_steps_and_pieces_agree():
    """A sequence in two calls, the state handed over, and token by token, is the sequence in one call."""
    (q, k, v, log_decay, state), _ = inputs()
    out, final = lightning(q, k, v, log_decay, state=state)
    first, middle = lightning(*(x[:, :, :50] for x in (q, k, v)), log_decay, state=state)
    second, last = lightning(*(x[:, :, 50:] for x in (q, k, v)), log_decay, state=middle)
    checks.assert_close((jnp.concatenate([first, second], 2), last), (out, final))
    step = jax.jit(lightning_step)
    for t in range(50, 53):
        got, middle = step(*(x[:, :, t] for x in (q, k, v)), log_decay, middle)
        checks.assert_close(got, out[:, :, t])


def test_tokens_behind_the_length_do_not_matter():
    (q, k, v, log_decay, state), _ = inputs()
    run = jax.jit(functools.partial(lightning, log_decay=log_decay, state=state, lengths=LENGTHS))
    want = run(q, k, v)
    behind = (jnp.arange(T) >= LENGTHS[:, None])[:, None, :, None]
    got = run(*(jnp.where(behind, 1e9, x) for x in (q, k, v)))
    checks.assert_close(got, want)
    assert not got[0][1, :, 41:].any()


def test_planted_bug_is_caught(monkeypatch):
    """A chain that hands each chunk the state after it, not before it, fails the comparison."""
    chain = chunked._chain

    def late(state, over, added, reverse=False):
        after, met = chain(state, over, added, reverse)
        return after, jnp.concatenate([met[:, :, 1:], after[:, :, None]], 2)

    monkeypatch.setattr(chunked, "_chain", late)
    (q, k, v, log_decay, state), _ = inputs()
    got = lightning(q, k, v, log_decay, state=state, lengths=LENGTHS, scale=0.5, block=16)
    assert checks.error(got[0], expected()[0][0]) > 0.1


def test_tpu_kernel_interpreted():
    checks.assert_close(both(*inputs(), "tpu", 32, True), expected())


def production():
    """Forward and backward at 4x8x8192x128, and the shapes of its arguments."""

    def run(impl, *primals):
        out, pull = jax.vjp(lambda *x: lightning(*x, impl=impl), *primals)
        return out, pull(out)

    gate = checks.avals((8,), dtype="float32")
    return run, (*checks.avals(*[(4, 8, 8192, 128)] * 3), *gate)


@pytest.mark.smoke
def test_tpu_kernels_lower():
    run, arguments = production()
    checks.assert_lowers(functools.partial(run, "tpu"), *arguments, platform="tpu", calls=3)


def test_dispatch_takes_the_kernel_of_the_platform():
    """Unnamed, the program for a TPU holds the kernels and that for a CPU does not."""
    run, arguments = production()
    checks.assert_lowers(functools.partial(run, None), *arguments, platform="tpu", calls=3)
    text = jax.jit(functools.partial(run, None)).trace(*arguments).lower(lowering_platforms=("cpu",)).as_text()
    assert "custom_call" not in text


@checks.needs_target("v5e")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
def test_tpu_kernels_compile(target):
    run, arguments = production()
    build = targets.compile_for(functools.partial(run, "tpu"), *arguments, target=target)
    checks.assert_within_budget("lightning", "4x8x8192x128 bfloat16 forward+backward", build)


@checks.needs_mosaic_gpu
def test_gpu_kernel_lowers():
    arguments = *checks.avals(*[(4, 8, 8192, 128)] * 3), *checks.avals((8,), dtype="float32")
    checks.assert_lowers(functools.partial(lightning, impl="gpu"), *arguments, platform="cuda")
    checks.assert_lowers(lightning, *arguments, platform="cuda")


@pytest.mark.smoke
@checks.needs_mosaic_gpu
def test_gpu_kernel_interpreted():
    """Two chunks, the second in part, two heads, two tiles of channels, an initial state."""
    q, k, v = checks.normal(2, *[(1, 2, 128, d) for d in (64, 64, 128)], dtype="bfloat16")
    state = checks.normal(3, (1, 2, 64, 128))[0]
    arguments = (q, k, v, -jnp.array([0.0, 0.05]))
    options = {"state": state, "lengths": jnp.array([100]), "scale": 0.5}
    got = lightning(*arguments, **options, impl="gpu", interpret=True)
    checks.assert_close(got, lightning(*arguments, **options, impl="ref"), "bfloat16")


@checks.needs_target("h200")
@pytest.mark.parametrize("dim", [64, 128])
def test_gpu_kernel_compiles(dim):
    arguments = *checks.avals(*[(4, 8, 8192, dim)] * 3), *checks.avals((8,), dtype="float32")
    build = targets.compile_for(functools.partial(lightning, impl="gpu"), *arguments, target="h200")
    checks.assert_within_budget("lightning", f"4x8x8192x{dim} bfloat16 forward", build)


def test_form_that_cannot_serve_says_why():
    (q, k, v, log_decay, _), _ = inputs("float16")
    with pytest.raises(UnsupportedError, match="impl='tpu' cannot serve this call: the TPU has no float16"):
        lightning(q, k, v, log_decay, impl="tpu")
    with pytest.raises(UnsupportedError, match="head sizes K of 64 or 128|Mosaic GPU kernels need jax 0.11.2"):
        lightning(q, k, v, log_decay, impl="gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((B, H, T))}, r"q: got \[2, 3, 75\], accepts an array \[B, H, T, K\]"),
        ({"v": jnp.zeros((B, H, T + 1, V))}, r"v: got \[2, 3, 76, 8\].*T = 75"),
        ({"k": jnp.zeros((B, H, T, K), jnp.bfloat16)}, "k: got bfloat16, accepts the dtype of q, float32"),
        ({"log_decay": jnp.zeros((H + 1,))}, r"log_decay: got \[4\]"),
        ({"log_decay": jnp.array([0.1, 0.0, 0.0])}, "log_decay: got 0.1.*, accepts logarithms of decays, at most 0"),
        ({"state": jnp.zeros((B, H, K, V), jnp.bfloat16)}, "state: got bfloat16, accepts float32"),
        ({"lengths": jnp.array([T, T + 1])}, r"lengths\[1\]: got 76, accepts 0 to 75"),
        ({"lengths": jnp.array([1.0, 2.0])}, "lengths: got float32, accepts integers"),
        ({"scale": float("nan")}, "scale: got nan, accepts a finite number"),
        ({"block": 0}, "block: got 0, accepts an integer of at least 1"),
        ({"impl": "fast"}, "impl: got 'fast', accepts"),
    ],
)
def test_bad_input(change, message):
    (q, k, v, log_decay, _), _ = inputs()
    with pytest.raises(ArgumentError, match=message):
        lightning(**{"q": q, "k": k, "v": v, "log_decay": log_decay} | change)
