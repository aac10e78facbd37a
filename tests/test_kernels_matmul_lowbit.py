"""Weight-only products: every element and grouping against the dequantized weight, in every form, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.kernel_checks import assert_close, normal

from jaxinfer.pallas_kernels._core.errors import ArgumentError
from jaxinfer.pallas_kernels.matmul import elements
from jaxinfer.pallas_kernels.matmul.int8acts import int8_matmul, quantize_rows
from jaxinfer.pallas_kernels.matmul.int8acts.api import FITTING
from jaxinfer.pallas_kernels.matmul.lowbit import lowbit_matmul, lowbit_matmul_across
from jaxinfer.pallas_kernels.matmul.weight import LowBit, contradiction, dequantize, make

N, K = 48, 64


def random_weight(element, groups, *, zeros=False, n=N, k=K, scales="float32", rows=1, seed=0):
    """Random codes, scales and zeros of a format, and the dense weight written out in numpy."""
    random, kind = np.random.default_rng(seed), elements.ELEMENTS[element]
    fields = random.integers(0, 2**kind.bits, (n, k)).astype(np.uint8)
    table = elements.table(kind)
    fields[~np.isfinite(table[fields])] = 0
    stored = jnp.asarray(fields)
    if kind.bits == 8:
        stored = jax.lax.bitcast_convert_type(stored, jnp.dtype(kind.stored))
    s = random.uniform(0.5, 1.5, (n // rows, groups)).astype(np.float32)
    factor = None
    if scales == "uint8":
        stored_s, s = jnp.asarray(127 + np.round(s), jnp.uint8), 2.0 ** np.round(s)
    else:
        stored_s = jnp.asarray(s).astype(scales)
        s = np.float32(stored_s)
    if scales == "float8_e4m3fn":
        factor, s = jnp.full((1, 1), 0.25), s * 0.25
    z = random.integers(-3, 4, (n, groups)) if zeros else np.zeros((n, groups), int)
    dense = (table[fields].reshape(n, groups, -1) - z[..., None]) * np.repeat(s, rows, 0)[..., None]
    w = make(stored, stored_s, element, zeros=jnp.asarray(z, jnp.int8) if zeros else None, factor=factor)
    return w, dense.reshape(n, k).astype(np.float32)


FORMATS = {
    "int8": ("int8", 1, {}),
    "int8 groups": ("int8", 4, {"zeros": True}),
    "int4": ("int4", 1, {}),
    "int4 groups": ("int4", 4, {"zeros": True, "scales": "bfloat16"}),
    "int3": ("int3", 1, {"zeros": True}),
    "int3 groups": ("int3", 4, {}),
    "int2 groups": ("int2", 2, {"zeros": True}),
    "mxfp4": ("e2m1", 2, {"scales": "uint8"}),
    "nvfp4": ("e2m1", 4, {"scales": "float8_e4m3fn"}),
    "fp6": ("e3m2", 1, {"scales": "float16"}),
    "fp8 blocks": ("e4m3", 2, {"rows": 16}),
    "e5m2": ("e5m2", 1, {}),
}


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
        y, pull = jax.vjp(lambda x: lowbit_matmul(x, w, block=20), few)
        return y, lowbit_matmul(many, w, block=20), pull(g)[0], lowbit_matmul_across(g, w), dequantize(w)

    y, wide, gradient, across, whole = run(few, many, g, w)
    np.testing.assert_allclose(whole, dense, rtol=1e-6)
    assert_close(y, few @ dense.T)
    assert_close((gradient, across), (g @ dense, g @ dense))
    assert wide.dtype == jnp.bfloat16
    assert_close(wide, np.float32(many) @ dense.T, "bfloat16")


@pytest.mark.parametrize("name", [name for name, (element, *_) in FORMATS.items() if element in FITTING])
@pytest.mark.parametrize("per_group", [False, True])
def test_integer_products_are_exact_for_the_rounded_activations(name, per_group):
    element, groups, options = FORMATS[name]
    w, dense = random_weight(element, groups, **options)
    few, one = normal(1, (3, K), (1, K))

    @jax.jit
    def run(few, one, w):
        return [
            (int8_matmul(x, w, per_group=per_group), *quantize_rows(x, groups if per_group else 1)) for x in (few, one)
        ]

    for y, codes, scales in run(few, one, w):
        rounded = np.float32(codes).reshape(len(codes), scales.shape[1], -1) * np.asarray(scales)[..., None]
        assert_close(y, rounded.reshape(-1, K) @ dense.T)
    naive = int8_matmul(few, w, per_group=per_group, impl="ref")
    assert_close(naive, run(few, one, w)[0][0])


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
    for product in (lowbit_matmul, int8_matmul):
        y = np.asarray(jax.jit(product)(x, w))
        assert np.isnan(y[1]).all() and not y[2].any() and np.isfinite(y[[0, 3]]).all()


@pytest.mark.parametrize("op", [lowbit_matmul, int8_matmul])
def test_no_dense_copy_of_the_weight_is_made(op):
    """Temporary memory of the compiled product is far below the weight in floats, and for 4 bits below it in bytes."""
    n = k = 2048
    for element, groups in (("int8", 1), ("int4", 16)):
        w, _ = random_weight(element, groups, n=8, k=k)
        spread = jax.tree.map(lambda a: jax.ShapeDtypeStruct((a.shape[0] * n // 8, a.shape[1]), a.dtype), w)
        x = jax.ShapeDtypeStruct((8, k), jnp.float32)
        temp = jax.jit(op).lower(x, spread).compile().memory_analysis().temp_size_in_bytes
        assert temp < n * k * 4 / 2.5, f"{op.__name__} {element}: {temp} bytes"


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
    with pytest.raises(ArgumentError, match="element: got 'e4m3'"):
        int8_matmul(x, random_weight("e4m3", 1)[0])
    with pytest.raises(ArgumentError, match="y: got"):
        lowbit_matmul_across(x, w)
    assert isinstance(w, LowBit)
