"""Gated linear attention: every form is the recurrence, for every chunk, length, state and gate; gradients too."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.linear.gla import blocked, gla, gla_step
from jaxinfer.pallas_kernels.linear.gla.ref import parallel
from tests import kernel_checks as checks

B, H, T, K, V = 2, 3, 75, 16, 8
LENGTHS = jnp.array([T, 41])


@functools.cache
def inputs(dtype="float32"):
    q, k, v, d_out = checks.normal(0, *((B, H, T, d) for d in (K, K, V, V)), dtype=dtype)
    state, d_state, x = checks.normal(1, (B, H, K, V), (B, H, K, V), (B, H, T, K))
    # Most gates near 1, as the paper's layer starts, some strong, some that shut a channel within a chunk.
    log_gate = jnp.where(x > 1.5, -50.0, jnp.where(x > 1, -3.0 * x, jax.nn.log_sigmoid(x) / 16))
    return (q, k, v, log_gate, state), (d_out, d_state)


@functools.partial(jax.jit, static_argnames=("impl", "block", "interpret"))
def both(primals, cotangents, impl, block=None, interpret=False):
    """Outputs and gradients, with ragged lengths, an initial state and a scale."""

    def run(q, k, v, log_gate, state):
        options = {"impl": impl, "block": block, "interpret": interpret, "scale": 0.5}
        return gla(q, k, v, log_gate, state=state, lengths=LENGTHS, **options)

    out, pull = jax.vjp(run, *primals)
    return out, pull(cotangents)


@functools.cache
def expected(dtype="float32"):
    return both(*inputs(dtype), "ref")


@pytest.mark.parametrize("block", [1, 7, 16, 48, 128, pytest.param(None, marks=pytest.mark.smoke)])
def test_blocked_is_the_recurrence(block):
    """Chunks of one token, chunks that do not divide the length, and one chunk that is longer than it."""
    checks.assert_close(both(*inputs(), "blocked", block), expected())


def test_blocked_in_bfloat16():
    checks.assert_close(both(*inputs("bfloat16"), "blocked"), expected("bfloat16"), "bfloat16")


def test_parallel_form_agrees():
    (q, k, v, log_gate, _), _ = inputs()
    checks.assert_close(gla(q, k, v, log_gate)[0], parallel(q, k, v, log_gate, scale=K**-0.5))


def test_steps_and_pieces_agree():
    """A sequence in two calls, the state handed over, and token by token, is the sequence in one call."""
    (q, k, v, log_gate, state), _ = inputs()
    out, final = gla(q, k, v, log_gate, state=state)
    first, middle = gla(*(x[:, :, :50] for x in (q, k, v, log_gate)), state=state)
    second, last = gla(*(x[:, :, 50:] for x in (q, k, v, log_gate)), state=middle)
    checks.assert_close((jnp.concatenate([first, second], 2), last), (out, final))
    step = jax.jit(gla_step)
    for t in range(50, 53):
        got, middle = step(*(x[:, :, t] for x in (q, k, v, log_gate)), middle)
        checks.assert_close(got, out[:, :, t])


def test_tokens_behind_the_length_do_not_matter():
    (q, k, v, log_gate, state), _ = inputs()
    run = jax.jit(functools.partial(gla, state=state, lengths=LENGTHS))
    want = run(q, k, v, log_gate)
    behind = (jnp.arange(T) >= LENGTHS[:, None])[:, None, :, None]
    got = run(*(jnp.where(behind, 1e9, x) for x in (q, k, v)), jnp.where(behind, -1.0, log_gate))
    checks.assert_close(got, want)
    assert not got[0][1, :, 41:].any()


def test_gates_that_would_overflow_a_quotient():
    """Sums of gates down to -3200 in a chunk: exp(-sum) is infinite, and the products of the levels are exact."""
    (q, k, v, _, state), cotangents = inputs()
    log_gate = jnp.full(k.shape, -50.0).at[:, :, ::3].set(-1e-3).at[:, :, 40:50].set(-jnp.inf)
    primals = (q, k, v, log_gate, state)
    checks.assert_close(both(primals, cotangents, "blocked"), both(primals, cotangents, "ref"))


def test_planted_bug_is_caught(monkeypatch):
    """A suffix that includes its own token's gate fails the comparison."""
    levels = blocked.levels

    def off_by_one(gate, size):
        return ((h, prefix, suffix * gate) for h, prefix, suffix in levels(gate, size))

    monkeypatch.setattr(blocked, "levels", off_by_one)
    (q, k, v, log_gate, state), _ = inputs()
    got = gla(q, k, v, log_gate, state=state, lengths=LENGTHS, scale=0.5)
    assert checks.error(got[0], expected()[0][0]) > 0.01


def test_tpu_kernel_interpreted():
    checks.assert_close(both(*inputs(), "tpu", 32, True), expected())


def production():
    """Forward and backward at 4x8x8192x128, and the shapes of its arguments."""

    def run(impl, *primals):
        out, pull = jax.vjp(lambda *x: gla(*x, impl=impl), *primals)
        return out, pull(out)

    gate = checks.avals((4, 8, 8192, 128), dtype="float32")
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
    checks.assert_within_budget("gla", "4x8x8192x128 bfloat16 forward+backward", build)


def test_form_that_cannot_serve_says_why():
    (q, k, v, log_gate, _), _ = inputs("float16")
    with pytest.raises(UnsupportedError, match="impl='tpu' cannot serve this call: the TPU has no float16"):
        gla(q, k, v, log_gate, impl="tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((B, H, T))}, r"q: got \[2, 3, 75\], accepts an array \[B, H, T, K\]"),
        ({"v": jnp.zeros((B, H, T + 1, V))}, r"v: got \[2, 3, 76, 8\].*T = 75"),
        ({"k": jnp.zeros((B, H, T, K), jnp.bfloat16)}, "k: got bfloat16, accepts the dtype of q, float32"),
        ({"log_gate": jnp.zeros((B, H, T))}, r"log_gate: got \[2, 3, 75\]"),
        ({"log_gate": jnp.zeros((B, H, T, K), jnp.float16)}, "log_gate: got float16, accepts float32"),
        ({"log_gate": jnp.full((B, H, T, K), 0.5)}, "log_gate: got 0.5, accepts logarithms of decays, at most 0"),
        ({"state": jnp.zeros((B, H, K, V), jnp.bfloat16)}, "state: got bfloat16, accepts float32"),
        ({"lengths": jnp.array([T, T + 1])}, r"lengths\[1\]: got 76, accepts 0 to 75"),
        ({"lengths": jnp.array([1.0, 2.0])}, "lengths: got float32, accepts integers"),
        ({"scale": float("nan")}, "scale: got nan, accepts a finite number"),
        ({"block": 0}, "block: got 0, accepts an integer of at least 1"),
        ({"impl": "fast"}, "impl: got 'fast', accepts"),
    ],
)
def test_bad_input(change, message):
    (q, k, v, log_gate, _), _ = inputs()
    with pytest.raises(ArgumentError, match=message):
        gla(**{"q": q, "k": k, "v": v, "log_gate": log_gate} | change)
