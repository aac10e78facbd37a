"""Lightning attention: every form is the recurrence, for every chunk, length, state and decay; gradients too."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels._core.errors import ArgumentError
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
