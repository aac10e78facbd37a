"""The Two-Pass Softmax: the usual one wherever that works, right where a sum of exponentials overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.softmax import blocked, softmax
from jaxinfer.pallas_kernels.softmax.pair import pair, power
from tests import kernel_checks as checks


def exact(x):
    """Softmax in float64."""
    x = np.asarray(x, np.float64)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("impl", ["ref", pytest.param("blocked", marks=pytest.mark.smoke)])
@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0, 1e4, -1e6])
def test_is_softmax(impl, offset):
    """e^500 is infinite in float32 and e^-500 is zero; an offset common to a row changes nothing."""
    x = 4 * checks.normal(0, (3, 1500))[0] + offset
    checks.assert_close(softmax(x, impl=impl, block=128), exact(x), factor=0.2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x = checks.normal(1, (4, 300), dtype=dtype)[0]
    got = softmax(x)
    assert got.dtype == x.dtype
    checks.assert_close(got, exact(x), dtype, factor=0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-8e6, 8e6, width=32) | st.floats(-200, 200, width=32), min_size=1, max_size=64))
def test_pair_is_the_exponential(values):
    """m 2^n = e^x for every x, by logarithms in float64: m keeps float32's precision however large x is."""
    x = np.zeros(64, np.float32)
    x[: len(values)] = values
    m, n = (np.asarray(a, np.float64) for a in _pair(x))
    assert (n == np.round(n)).all() and (m >= 0.5).all() and (m <= 2).all()
    np.testing.assert_allclose(np.log(m) + n * np.log(2), x.astype(np.float64), atol=2e-6, rtol=1e-15)


_pair = jax.jit(pair)


def test_masked_entries():
    inf = jnp.inf
    x = jnp.array([[1.0, -inf, 2.0, -1e30], [-inf] * 4, [-1e30] * 4, [0.0, jnp.nan, 0.0, 0.0], [inf, 0, 0, 0]])
    got = np.asarray(softmax(x))
    np.testing.assert_allclose(got[0, [0, 2]], exact(np.array([1.0, 2.0])), rtol=1e-6)
    assert (got[0, [1, 3]] == 0).all() and (got[1] == 0).all() and (got[2] == 0.25).all()
    assert np.isnan(got[3]).all()


def test_gradient_and_axis():
    x, d_out = checks.normal(2, (5, 700, 2), (5, 700, 2))
    got = jax.vjp(lambda x: softmax(x, axis=1), x)[1](d_out)
    checks.assert_close(got, jax.vjp(lambda x: jax.nn.softmax(x, axis=1), x)[1](d_out))


def test_planted_bug_is_caught(monkeypatch):
    """Powers that saturate at 2^-20 instead of vanishing fail the comparison."""
    monkeypatch.setattr(blocked, "power", lambda n: power(jnp.maximum(n, -20.0)))
    x = 40 * checks.normal(0, (3, 1500))[0]
    assert checks.error(softmax(x, block=128), exact(x)) > 1e-4


def test_tpu_kernel_interpreted():
    """Two row tiles, the second in part; three column blocks, the last in part; a row of -inf."""
    x = 40 * checks.normal(3, (19, 300))[0] + 300
    x = x.at[5, 17].set(-jnp.inf)
    checks.assert_close(softmax(x, impl="tpu", block=128, interpret=True), exact(x), factor=0.2)
    assert not softmax(x.at[3].set(-jnp.inf), impl="tpu", block=128, interpret=True)[3].any()


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(64, 2**18), (4096, 1000)])
def test_tpu_kernel_lowers(shape):
    checks.assert_lowers(softmax, *checks.avals(shape), platform="tpu")


@checks.needs_target("v5e")
def test_tpu_kernel_compiles():
    build = targets.compile_for(softmax, *checks.avals((64, 2**18)), target="v5e")
    checks.assert_within_budget("softmax", "64x262144 bfloat16", build)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": jnp.float32(1)}, r"x: got \(\), accepts an array of at least one axis"),
        ({"x": jnp.zeros((2, 0))}, r"x: got \(2, 0\)"),
        ({"x": jnp.zeros((2, 3), jnp.int32)}, "x: got int32, accepts float32 or bfloat16 or float16"),
        ({"x": jnp.zeros((2, 3)), "axis": 2}, "axis: got 2, accepts -2 to 1"),
        ({"x": jnp.zeros((2, 3)), "block": 1.5}, "block: got 1.5"),
        ({"x": jnp.zeros((2, 3)), "impl": "three"}, "impl: got 'three'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        softmax(**arguments)
