"""Weight-only products: every element and grouping against the dequantized weight, in every form, and its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.matmul import arg_specs, elements
from jaxinfer.pallas_kernels.matmul.lowbit import digits, gpu, lowbit_matmul, lowbit_matmul_across
from jaxinfer.pallas_kernels.matmul.weight import LowBit, contradiction, dequantize
from tests import kernel_checks as checks
from tests.kernel_checks import assert_close, normal
from tests.lowbit_weights import FORMATS, K, N, assert_no_dense_copy, random_weight


@pytest.mark.parametrize("name", FORMATS)
def test_products_and_gradients_are_those_of_the_dense_weight(name):
    """Few rows, and enough of them for bfloat16 products; blocks that reach back; the transposed product; gradients."""
    element, groups, options = FORMATS[name]
    w, dense = random_weight(element, groups, **options)
    assert contradiction(w) is None and (w.outputs, w.inputs, w.groups) == (N, K, groups)
    few, many, g = normal(1, (3, K), (20, K), (3, N))
    many = many.astype(jnp.bfloat16)

    @jax.jit
    def run(few, many, g, w):
        y, pull = jax.vjp(lambda x: lowbit_matmul(x, w, block=20, impl="blocked"), few)
        return y, lowbit_matmul(many, w, block=20), pull(g)[0], dequantize(w)

    y, wide, gradient, whole = run(few, many, g, w)
    np.testing.assert_allclose(whole, dense, rtol=1e-6)
    assert_close((y, gradient), (few @ dense.T, g @ dense))
    assert wide.dtype == jnp.bfloat16
    assert_close(wide, np.float32(many) @ dense.T, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "int3"])
def test_digits_are_as_exact_as_floats(name):
    """Few rows, of all magnitudes, against float64; a digit too few is seen."""
    element, groups, options = FORMATS[name]
    w, dense = random_weight(element, groups, **options)
    x = jnp.stack([1e-30 * normal(1, (K,))[0], 1e30 * normal(2, (K,))[0]])
    got = np.asarray(jax.jit(functools.partial(lowbit_matmul, impl="digits"))(x, w), np.float64)
    assert not np.any(lowbit_matmul(jnp.zeros((1, K)), w, impl="digits"))
    want = np.asarray(x, np.float64) @ dense.T
    scale = np.abs(np.asarray(x)).max(-1, keepdims=True) * np.abs(dense).sum(-1)
    assert (np.abs(got - want) <= 2e-7 * scale).all()
    codes, unit = (np.asarray(a, np.float64) for a in jax.jit(digits.digits_of)(x))
    short = (codes[0] + codes[1] / digits.BASE) * unit @ dense.T
    assert (np.abs(short - want) > 2e-7 * scale).any(), "two digits would pass"


@pytest.mark.slow
@pytest.mark.parametrize("element", ["int3", "e4m3"])
@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(
    m=st.sampled_from([1, 3, 17]),
    n=st.sampled_from([1, 7, 33]),
    groups=st.sampled_from([1, 2, 6]),
    each=st.sampled_from([8, 24]),
    block=st.sampled_from([1, 5, None]),
)
def test_blocks_are_the_reference_for_every_shape(element, m, n, groups, each, block):
    """Ragged numbers of rows, outputs and groups, one of each, and blocks that reach back."""
    assume(element != "int3" or groups > 1)
    w, dense = random_weight(element, groups, n=n, k=groups * each)
    x = normal(m, (m, groups * each))[0]
    y = jax.jit(functools.partial(lowbit_matmul, block=block, impl="blocked"))(x, w)
    assert_close(y, x @ dense.T)


# One of each way through the TPU kernel: one group, several in a tile, a group over tiles, two planes, floats.
TPU_FORMATS = {
    "int8": ("int8", 1, 256, {}),
    "int4 zeros": ("int4", 8, 512, {"zeros": True}),
    "int2 wide groups": ("int2", 2, 2048, {}),
    "int3": ("int3", 8, 1024, {"zeros": True}),
    "nvfp4": ("e2m1", 16, 256, {"scales": "float8_e4m3fn"}),
    "fp8 blocks": ("e4m3", 2, 256, {"rows": 16}),
}


@pytest.mark.parametrize("name", TPU_FORMATS)
def test_the_tpu_form_interpreted(name):
    element, groups, k, options = TPU_FORMATS[name]
    w, dense = random_weight(element, groups, n=128, k=k, **options)
    x, g = normal(1, (3, k), (3, 128))

    @jax.jit
    def run(x, g, w):
        y, pull = jax.vjp(lambda x: lowbit_matmul(x, w, impl="tpu", interpret=True), x)
        return y, pull(g)[0]

    assert_close(run(x, g, w), (x @ dense.T, g @ dense))


@pytest.mark.parametrize("name", arg_specs.FORMATS)
def test_every_format_lowers_for_tpu(name):
    n, k = arg_specs.SHAPES[1]
    w = arg_specs.weight(name, n, k)
    for m, dtype in ((1, "bfloat16"), (512, "float32")):
        x = checks.avals((m, k), dtype=dtype)
        checks.assert_lowers(lambda x, w: lowbit_matmul(x, w, impl="tpu"), *x, w, platform="tpu")


@checks.needs_mosaic_gpu
@pytest.mark.parametrize("name", arg_specs.FORMATS)
def test_every_format_lowers_for_hopper(name):
    n, k = arg_specs.SHAPES[1]
    w = arg_specs.weight(name, n, k)
    for m in (1, 512):
        checks.assert_lowers(lambda x, w: lowbit_matmul(x, w, impl="gpu"), *checks.avals((m, k)), w, platform="cuda")


@checks.needs_target("v5e")
@pytest.mark.parametrize("name", arg_specs.FORMATS)
def test_every_format_compiles_for_tpu(name):
    n, k = arg_specs.SHAPES[1]
    build = targets.compile_for(
        lambda x, w: lowbit_matmul(x, w, impl="tpu"), *checks.avals((64, k)), arg_specs.weight(name, n, k), target="v5e"
    )
    checks.assert_within_budget("lowbit", name, build)


@checks.needs_target("h200")
@pytest.mark.parametrize("m", [16, 64, 512])
@pytest.mark.parametrize("name", arg_specs.FORMATS)
def test_every_format_compiles_for_hopper(name, m):
    n, k = arg_specs.SHAPES[1]
    build = targets.compile_for(
        lambda x, w: lowbit_matmul(x, w, impl="gpu"), *checks.avals((m, k)), arg_specs.weight(name, n, k), target="h200"
    )
    checks.assert_within_budget("lowbit", f"{name}, {m} rows", build)


@pytest.mark.parametrize("element,groups", [("int4", 4), ("e2m1", 2), ("int8", 4)])
def test_stream_order_is_that_of_the_bytes(element, groups):
    """What the Hopper kernel multiplies, written with arrays: bytes read as int4, by x in stream order."""
    w, _ = random_weight(element, groups)
    x = normal(1, (3, K))[0]
    codes = np.asarray(gpu.as_streamed(w).astype(jnp.int32))
    kind = elements.ELEMENTS[element]
    values = elements.table(kind)[codes & (2**kind.bits - 1)] * np.repeat(np.asarray(w.scales), K // groups, 1)
    assert_close(gpu.in_stream_order(x, w) @ values.T, lowbit_matmul(x, w, impl="ref"))


def test_forms_say_why_they_cannot_serve():
    w, _ = random_weight("int4", 4)
    x = jnp.ones((3, K))
    with pytest.raises(UnsupportedError, match="impl='tpu'.*multiples of 128 lanes"):
        lowbit_matmul(x, w, impl="tpu")
    with pytest.raises(UnsupportedError, match="impl='gpu'.*(jax 0.11.2|bfloat16)"):
        lowbit_matmul(x, w, impl="gpu")


def test_scales_get_their_gradient():
    w, _ = random_weight("int4", 4, zeros=True)
    x, g = normal(1, (3, K), (3, N))

    def loss(scales, product):
        return jnp.sum(product(x, dataclasses.replace(w, scales=scales)) * g)

    got = jax.jit(jax.grad(lambda s: loss(s, lowbit_matmul)))(w.scales)
    want = jax.jit(jax.grad(lambda s: loss(s, lambda x, w: x @ dequantize(w).T)))(w.scales)
    assert_close(got, want)


@pytest.mark.smoke
def test_a_wrong_bit_layout_is_caught():
    """The planted bugs: nibbles the other way round, and zeros of the neighbouring group."""
    w, dense = random_weight("int4", 4, zeros=True)
    x = normal(1, (3, K))[0]
    swapped = dataclasses.replace(w, codes=(w.codes << 4) | (w.codes >> 4))
    shifted = dataclasses.replace(w, zeros=jnp.roll(w.zeros, 1, -1))
    product = jax.jit(lowbit_matmul)
    assert_close(product(x, w), x @ dense.T)
    for planted in (swapped, shifted):
        with pytest.raises(AssertionError):
            assert_close(product(x, planted), x @ dense.T)


def test_rows_of_nan_and_zero_stay_alone():
    w, dense = random_weight("int4", 4)
    x = normal(1, (4, K))[0].at[1].set(jnp.nan).at[2].set(0.0)
    y = np.asarray(jax.jit(lowbit_matmul)(x, w))
    assert np.isnan(y[1]).all() and not y[2].any() and np.isfinite(y[[0, 3]]).all()


def test_no_dense_copy_of_the_weight_is_made():
    """Temporary memory of the compiled product is far below the weight in floats, and for 4 bits below it in bytes."""
    for element, groups in (("int8", 1), ("int4", 16)):
        assert_no_dense_copy(lowbit_matmul, element, groups)


def bad(**changes):
    w, _ = random_weight("int4", 4)
    return dataclasses.replace(w, **changes)


@pytest.mark.parametrize(
    "x,w,words",
    [
        ((3, K + 1), bad(), r"lowbit_matmul: x: got \[3, 65\]"),
        ((K,), bad(), "lowbit_matmul: x"),
        ((3, K), bad(scales=jnp.ones((N, 5))), "scales: got"),
        ((3, K), bad(scales=jnp.ones((N, 4), jnp.int32)), "scales: got int32"),
        ((3, K), bad(scales=jnp.ones((N, 64))), "scales: got .*groups of 1"),
        ((3, K), bad(zeros=jnp.ones((4, N), jnp.int8)), "zeros: got"),
        ((3, K), bad(zeros=jnp.ones((N, 4), jnp.int32)), "zeros: got int32 for int4"),
        ((3, K), bad(high=jnp.ones((N, 8), jnp.uint8)), "high: got"),
        ((3, K), bad(codes=jnp.ones((N, 32), jnp.int8)), "codes: got int8"),
        ((3, K), bad(factor=jnp.ones(())), "factor: got"),
        ((3, K), bad(element="int5"), "element: got 'int5'"),
    ],
)
def test_bad_arrays_are_refused_by_name(x, w, words):
    with pytest.raises(ArgumentError, match=words):
        lowbit_matmul(jnp.ones(x), w)


def test_bad_options_are_refused_by_name():
    w, _ = random_weight("int4", 4)
    x = jnp.ones((3, K))
    with pytest.raises(ArgumentError, match="impl: got 'fast'"):
        lowbit_matmul(x, w, impl="fast")
    with pytest.raises(ArgumentError, match="block: got 0"):
        lowbit_matmul(x, w, block=0)
    with pytest.raises(ArgumentError, match="x: got int32"):
        lowbit_matmul(x.astype(jnp.int32), w)
    with pytest.raises(ArgumentError, match="y: got"):
        lowbit_matmul_across(x, w)
    assert isinstance(w, LowBit)
