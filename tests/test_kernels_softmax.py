"""The Two-Pass Softmax: the usual one wherever that works, right where a sum of exponentials overflows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.dispatch import mosaic_gpu_refuses
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.softmax import blocked, gpu, softmax
from jaxinfer.pallas_kernels.softmax.pair import pair, power
from tests import kernel_checks as checks


def exact(x):
    """Softmax in float64."""
    x = np.asarray(x, np.float64)
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("impl", "block", "axis", "interpret"))
def both(x, d_out, **options):
    """The softmax and the gradient of x."""
    out, pull = jax.vjp(functools.partial(softmax, **options), x)
    return out, *pull(d_out)


def assert_softmax(got, x, d_out, dtype="float32"):
    """`both` agrees with float64; the gradient relative to its terms, which cancel where a row has one entry."""
    y, d = exact(x), np.asarray(d_out, np.float64)
    gradient = y * (d - (y * d).sum(-1, keepdims=True))
    checks.assert_close(got[0], y, dtype, factor=0.5)
    off = np.abs(np.asarray(got[1], np.float64) - gradient).max()
    assert off <= checks.TOLERANCE[dtype] * np.abs(y * d).max()


# One entry, fewer than a step of the lanes (8 x 32), whole steps of one row alone, whole steps and a rest.
SHAPES = ((1, 1), (5, 100), (1, 2048), (3, 1500))


@pytest.mark.smoke
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from([0.0, 500.0, -500.0, 1e4, -1e6]), st.sampled_from([1.0, 40.0]),
    st.integers(0, 3),
)  # fmt: skip
def test_is_softmax(shape, offset, spread, seed):
    """e^500 is infinite in float32 and e^-500 is zero; an offset common to a row changes nothing."""
    x, d_out = checks.normal(seed, shape, shape)
    x = spread * x + offset
    assert_softmax(both(x, d_out, impl="blocked", block=32), x, d_out)
    assert_softmax(both(x, d_out, impl="ref"), x, d_out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x, d_out = checks.normal(1, *[(3, 1500)] * 2, dtype=dtype)
    got = both(x, d_out, block=32)
    assert got[0].dtype == got[1].dtype == x.dtype
    assert_softmax(got, x, d_out, dtype)


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


INF = float("inf")
ODD_ROWS = [
    [1.0, -INF, 2.0, -1e30],
    [-INF] * 4,
    [-1e30] * 4,
    [0.0, np.nan, 0.0, 0.0],
    [INF, 0, 0, 3e30],
    [INF, 0, 0, 0],
]


def assert_odd_rows(got):
    """What the docstring says of infinities and of what is beyond 2^23."""
    got = np.asarray(got, np.float32)
    np.testing.assert_allclose(got[0, [0, 2]], exact(np.array([1.0, 2.0])), rtol=1e-6)
    assert (got[0, [1, 3]] == 0).all() and (got[1] == 0).all() and (got[2] == 0.25).all()
    assert np.isnan(got[3]).all() and got[4].tolist() == [0.5, 0, 0, 0.5]


@pytest.mark.parametrize("impl", ["ref", "blocked", "usual"])
def test_odd_entries(impl):
    x = jnp.array(ODD_ROWS)
    assert_odd_rows(both(x, x, impl=impl)[0])


def test_other_axes():
    x, d_out = checks.normal(2, (2, 100, 3), (2, 100, 3))
    want = both(jnp.moveaxis(x, 1, 2), jnp.moveaxis(d_out, 1, 2))
    checks.assert_close(both(x, d_out, axis=1), [jnp.moveaxis(a, 2, 1) for a in want])


def test_planted_bug_is_caught(monkeypatch):
    """Powers that saturate at 2^-20 instead of vanishing fail the comparison."""
    monkeypatch.setattr(blocked, "power", lambda n: power(jnp.maximum(n, -20.0)))
    x = 40 * checks.normal(0, (3, 1500))[0]
    assert checks.error(jax.jit(lambda x: softmax(x, block=32))(x), exact(x)) > 2e-5  # twice the tolerance


def test_tpu_kernel_interpreted():
    """Two row tiles, the second in part; three column blocks, the last in part; a row of -inf."""
    x, d_out = checks.normal(3, (19, 300), (19, 300))
    x = (40 * x + 300).at[5, 17].set(-jnp.inf)
    options = {"impl": "tpu", "block": 128, "interpret": True}
    assert_softmax(both(x, d_out, **options), x, d_out)
    assert not both(x.at[3].set(-jnp.inf), d_out, **options)[0][3].any()


@checks.needs_mosaic_gpu
@pytest.mark.parametrize("length", [300, 10000], ids=["in registers", "two passes"])
def test_gpu_kernel_interpreted(length, monkeypatch):
    """Rows that end within a tile; what the two blocks of a long row, of 3 tiles and 2, leave is added."""
    monkeypatch.setattr(gpu, "BLOCKS", 4)
    x, d_out = checks.normal(3, (2, length), (2, length))
    x = (40 * x + 300).at[1, 17].set(-jnp.inf)
    assert_softmax(both(x, d_out, impl="gpu", interpret=True), x, d_out)


@checks.needs_mosaic_gpu
def test_gpu_kernel_interpreted_on_odd_entries():
    x = jnp.pad(jnp.array(ODD_ROWS), ((0, 0), (0, 296)), constant_values=-INF)
    assert_odd_rows(both(x, x, impl="gpu", interpret=True)[0][:, :4])


@checks.needs_mosaic_gpu
def test_planted_bug_in_gpu_kernel_is_caught(monkeypatch):
    """A last tile that forgets what the tile before it has counts entries twice."""
    monkeypatch.setattr(gpu, "tiles_of_row", lambda length, unit: [(0, 256, 0), (length - 256, 256, 0)])
    x, _ = checks.normal(3, (2, 300), (2, 300))
    assert checks.error(softmax(x, impl="gpu", interpret=True), exact(x)) > 0.1


def run(x):
    out, pull = jax.vjp(softmax, x)
    return out, pull(out)


SIZES = [(64, 2**18), (4096, 1000)]


@pytest.mark.smoke
@pytest.mark.parametrize("shape", SIZES)
def test_tpu_kernel_lowers(shape):
    checks.assert_lowers(run, *checks.avals(shape), platform="tpu", calls=2)


@checks.needs_mosaic_gpu
@pytest.mark.parametrize(("shape", "calls"), [(SIZES[0], 4), (SIZES[1], 2)])
def test_gpu_kernel_lowers(shape, calls):
    checks.assert_lowers(run, *checks.avals(shape), platform="cuda", calls=calls)


@checks.needs_target("v5e")
def test_tpu_kernel_compiles():
    build = targets.compile_for(run, *checks.avals((64, 2**18)), target="v5e")
    checks.assert_within_budget("softmax", "64x262144 bfloat16", build)


@checks.needs_target("h200")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((64, 2**18), "bfloat16"),
        ((1, 2**24), "float32"),
        ((4096, 1000), "float16"),
        ((4096, 8192), "float32"),
        ((32, 50257), "bfloat16"),
    ],
)
def test_gpu_kernel_compiles(shape, dtype):
    build = targets.compile_for(run, *checks.avals(shape, dtype=dtype), target="h200")
    checks.assert_within_budget("softmax", f"{shape[0]}x{shape[1]} {dtype}", build)


def test_forms_that_cannot_serve_say_why():
    with pytest.raises(UnsupportedError, match="the TPU has no float16"):
        softmax(jnp.zeros((2, 300), jnp.float16), impl="tpu")
    reason = mosaic_gpu_refuses() or "rows of 100 entries do not fill a warpgroup"
    with pytest.raises(UnsupportedError, match=reason):
        softmax(jnp.zeros((2, 100)), impl="gpu")


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
