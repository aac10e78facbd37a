"""Flash attention: every form is the plain softmax, forward and backward, for all masks, lengths and head groups."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.attention.combine import combine
from jaxinfer.pallas_kernels.attention.flash import api, flash
from jaxinfer.pallas_kernels.attention.flash.arg_specs import SPECS
from tests.kernel_checks import (
    assert_close,
    assert_lowers,
    assert_within_budget,
    error,
    needs_mosaic_gpu,
    needs_target,
    normal,
    targets,
)

# name -> (B, H, G, T, S, d, e), options. Lengths that are no multiples of blocks, and rows that see nothing.
CASES = {
    "full": ((2, 4, 4, 24, 40, 16, 16), {}),
    "causal, grouped, more keys": ((1, 4, 2, 40, 104, 16, 24), {"causal": True}),
    "ragged, alibi, softcap": (
        (3, 4, 2, 40, 56, 16, 16),
        {"causal": True, "softcap": 8.0, "q_lengths": [40, 17, 0], "kv_lengths": [56, 9, 30], "slopes": True},
    ),
}


def problem(name, dtype="float32"):
    """`(q, k, v), cotangents, options` of a case."""
    (b, h, g, t, s, d, e), options = CASES[name]
    q, k, v, dout = normal(7, (b, h, t, d), (b, g, s, d), (b, g, s, e), (b, h, t, e), dtype=dtype)
    options = dict(options)
    for key in ("q_lengths", "kv_lengths"):
        if key in options:
            options[key] = jnp.asarray(options[key], jnp.int32)
    if options.get("slopes"):
        options["slopes"] = 2.0 ** -jnp.arange(1, h + 1, dtype=jnp.float32)
    return (q, k, v), (dout, normal(8, (b, h, t))[0]), options


@functools.cache
def results(name, dtype="float32", **how):
    """Both results and the three gradients, of one compiled program."""
    qkv, cotangents, options = problem(name, dtype)

    @jax.jit
    def run(qkv, cotangents):
        out, pull = jax.vjp(lambda *x: flash(*x, **options, **how), *qkv)
        return out, pull(cotangents)

    return run(qkv, cotangents)


@pytest.mark.parametrize("name", ["causal, grouped, more keys", "ragged, alibi, softcap"])
def test_blocked_is_the_softmax(name):
    assert_close(results(name, impl="blocked", block=(16, 8)), results(name, impl="ref"), factor=3)


@pytest.mark.slow
@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2)]),
    lengths=st.sampled_from([(1, 1), (1, 37), (24, 7), (33, 50)]),
    options=st.sampled_from([{}, {"causal": True}, {"window": 9, "causal": True}, {"window": 5, "softcap": 4.0}]),
    whole=st.sampled_from([None, (0, 1.0), (1.0, 0), (0.6, 0.3)]),
)
def test_blocked_is_the_softmax_at_any_shape(heads, lengths, options, whole):
    """Shapes that blocks do not divide, single rows, rows without queries or keys."""
    (h, g), (t, s) = heads, lengths
    q, k, v = normal(3, (2, h, t, 8), (2, g, s, 8), (2, g, s, 4))
    if whole is not None:
        options = options | {
            name: jnp.asarray([n, int(n * part)], jnp.int32)
            for name, n, part in zip(("q_lengths", "kv_lengths"), lengths, whole, strict=True)
        }

    def run(impl):
        return jax.jit(lambda *x: flash(*x, **options, impl=impl, block=(16, 8)))(q, k, v)

    assert_close(run("blocked"), run("ref"), factor=3)


@pytest.mark.smoke
def test_bfloat16_and_default_blocks():
    name = "ragged, alibi, softcap"
    assert_close(results(name, "bfloat16"), results(name, "bfloat16", impl="ref"), "bfloat16", factor=2)


@pytest.mark.parametrize("name", ["causal, grouped, more keys", "ragged, alibi, softcap"])
def test_tpu_form_interpreted(name):
    assert_close(results(name, interpret=True, block=(128, 32)), results(name, impl="ref"), factor=3)


def both_directions(spec, impl):
    """A function of a Spec's arrays whose program holds the forward and the backward kernels."""

    def run(qkv, arrays):
        out, pull = jax.vjp(lambda *x: flash(*x, **spec.options, **arrays, impl=impl), *qkv)
        return pull(out)

    return run


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tpu_form_lowers(spec):
    assert_lowers(both_directions(spec, None), spec.qkv(), spec.arrays(), platform="tpu", calls=3)


@needs_target("v5e")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_tpu_form_compiles(spec, target):
    build = targets.compile_for(both_directions(spec, "tpu"), spec.qkv(), spec.arrays(), target=target)
    assert len(build.kernels) == 3
    assert_within_budget("flash", spec.name, build)


SPLASH_SPECS = [spec for spec in SPECS if not spec.ragged]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 50, "softcap": 5.0}], ids=["causal", "window"])
def test_splash_is_the_softmax(options):
    """jax's own kernel in the interpreter: output, log-sum-exp and gradients, of grouped heads and more keys."""
    q, k, v, dout = normal(4, (1, 2, 128, 64), *[(1, 1, 256, 64)] * 2, (1, 2, 128, 64), dtype="bfloat16")

    def run(impl):
        @jax.jit
        def both(q, k, v, dout):
            def attend(*x):
                return flash(*x, **options, impl=impl, interpret=impl == "splash")

            out, pull, lse = jax.vjp(attend, q, k, v, has_aux=True)
            return out, lse, pull(dout)

        return both(q, k, v, dout)

    assert_close(run("splash"), run("ref"), "bfloat16")


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ([(1, 2, 256, 64)] * 3, {"slopes": jnp.ones(2)}, "ALiBi"),
        ([(1, 2, 256, 64)] * 3, {"kv_lengths": np.array([3])}, "ragged rows"),
        ([(1, 2, 256, 64), *[(1, 2, 128, 64)] * 2], {"causal": True}, "see nothing"),
        ([(1, 2, 100, 64)] * 3, {}, "multiples of 128"),
    ],
    ids=["alibi", "ragged", "empty rows", "odd length"],
)
def test_what_splash_cannot_do_goes_to_our_kernel(shapes, options, reason):
    """Asked for by name it says why not; left open, the same call lowers for the TPU to our own kernel."""
    qkv = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    with pytest.raises(UnsupportedError, match=f"impl='splash' cannot serve this call: .*{reason}"):
        flash(*qkv, impl="splash", **options)
    assert_lowers(lambda *x: flash(*x, **options), *qkv, platform="tpu")


@needs_target("v5e")
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize("spec", SPLASH_SPECS, ids=lambda spec: spec.name)
def test_splash_compiles(spec, target):
    """Forward, forward again without the log-sum-exp, and its two backward kernels."""

    def run(*qkv):
        out, pull = jax.vjp(lambda *x: flash(*x, **spec.options, impl="splash")[0], *qkv)
        return pull(out)

    assert len(targets.compile_for(run, *spec.qkv(), target=target).kernels) == 4


GPU_SPECS = [spec for spec in SPECS if spec.sizes[-1] <= 128]


@needs_mosaic_gpu
@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.name)
def test_gpu_form_lowers(spec):
    assert_lowers(both_directions(spec, "gpu"), spec.qkv(), spec.arrays(), platform="cuda", calls=3)


@needs_target("h200")
@pytest.mark.parametrize("spec", GPU_SPECS, ids=lambda spec: spec.name)
def test_gpu_form_compiles(spec):
    build = targets.compile_for(both_directions(spec, "gpu"), spec.qkv(), spec.arrays(), target="h200")
    assert len(build.kernels) == 3
    assert_within_budget("flash", spec.name, build)


def test_what_a_form_cannot_do_is_said():
    """A form asked for by name raises its reason; nothing falls back in silence."""
    q, k, v = normal(0, *[(1, 2, 64, 64)] * 3, dtype="bfloat16")
    for impl, options, reason in [
        ("cudnn", {"softcap": 1.0}, "soft-capping"),
        ("gpu", {"interpret": True}, "Mosaic GPU"),
        ("gpu", {"block": (32, 64)}, "Mosaic GPU|blocks of 32 queries"),
    ]:
        with pytest.raises(UnsupportedError, match=f"flash: impl='{impl}' cannot serve this call: .*({reason})"):
            flash(q, k, v, impl=impl, **options)
    with pytest.raises(UnsupportedError, match="float16"):
        flash(*(x.astype(jnp.float16) for x in (q, k, v)), impl="tpu")


def test_empty_rows():
    """A row without keys has lse = -inf, out = 0 and no gradient, and its neighbours are untouched."""
    (out, lse), (dq, dk, dv) = results("ragged, alibi, softcap", impl="blocked", block=(16, 8))
    assert np.all(np.asarray(lse[2]) == -np.inf) and not np.any(out[2])
    assert np.all(np.asarray(lse[1, :, :8]) == -np.inf), "17 queries that end with 9 keys: the first 8 see none"
    assert np.all(np.isfinite(lse[1, :, 8:17]))
    assert not np.any(dq[2]) and not np.any(dk[2]) and not np.any(dv[2])


@pytest.mark.slow
def test_parts_combine():
    """Attention over two halves of the keys, merged, is attention over all of them."""
    (q, k, v), _, _ = problem("full")

    @jax.jit
    def run(q, k, v):
        halves = [flash(q, k[:, :, at], v[:, :, at], block=(24, 40)) for at in (slice(0, 13), slice(13, None))]
        return combine(halves), flash(q, k, v, impl="ref")

    merged, whole = run(q, k, v)
    assert_close(merged, whole, factor=2)


def test_a_mask_off_by_one_is_caught(monkeypatch):
    """Negative control: a causal mask that hides the diagonal fails the comparison by far."""
    name = "causal, grouped, more keys"
    good = results(name, impl="ref")

    @dataclasses.dataclass(frozen=True)
    class Off(api.Rules):
        def visible(self, distance):
            return distance > 0

    monkeypatch.setattr(api, "Rules", Off)
    bad = results.__wrapped__(name, impl="blocked", block=(16, 8))
    assert min(error(a, b) for a, b in zip(jax.tree.leaves(bad), jax.tree.leaves(good), strict=True)) > 1e-2


def test_memory_is_linear_in_the_length():
    """Twice the length takes twice the temporary memory of forward and backward, not four times."""

    def temporary(length):
        f = jax.jit(jax.grad(lambda q, k, v: flash(q, k, v, causal=True, block=(64, 64))[0].sum(), (0, 1, 2)))
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        return f.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((1, 3, 8, 16)), "v": jnp.zeros((1, 3, 8, 16))}, "k: got 3 heads.*divides the 4 heads"),
        ({"v": jnp.zeros((1, 2, 9, 16))}, r"v: got \[1, 2, 9, 16\]"),
        ({"q": jnp.zeros((4, 8, 16))}, r"q: got \[4, 8, 16\], accepts an array \[B, H, T, d\]"),
        ({"q": jnp.zeros((1, 4, 8, 16), jnp.int32)}, "q: got int32"),
        ({"k": jnp.zeros((1, 2, 8, 16), jnp.bfloat16)}, "k: got bfloat16, accepts the dtype of q"),
        ({"window": 0}, "window: got 0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
        ({"kv_lengths": np.array([9])}, r"kv_lengths\[0\]: got 9, accepts 0 to 8"),
        ({"q_lengths": np.array([1.0])}, "q_lengths: got float64, accepts integers"),
        ({"slopes": jnp.zeros(3)}, "slopes: got"),
        ({"block": (64,)}, "block: got"),
        ({"impl": "nope"}, "impl: got 'nope', accepts .*'blocked'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"q": jnp.zeros((1, 4, 8, 16)), "k": jnp.zeros((1, 2, 8, 16)), "v": jnp.zeros((1, 2, 8, 16))} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ArgumentError, match=message):
        flash(q, k, v, **arguments)
