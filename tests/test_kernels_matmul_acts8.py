"""Products of activations rounded to 8 bits against the rounded activations times the dense weight, form by form."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core import targets
from jaxinfer.pallas_kernels._core.errors import ArgumentError, UnsupportedError
from jaxinfer.pallas_kernels.matmul import arg_specs, elements
from jaxinfer.pallas_kernels.matmul.acts8 import float8_matmul, int8_matmul, quantize_rows
from jaxinfer.pallas_kernels.matmul.sums8 import FITTING
from tests import kernel_checks as checks
from tests.kernel_checks import assert_close, normal
from tests.lowbit_weights import FORMATS, K, assert_no_dense_copy, random_weight

FLOAT8 = ("e4m3", "e5m2")
CASES = [(name, False) for name, (element, *_) in FORMATS.items() if element in (*FITTING, *FLOAT8)]
CASES += [("int8 groups", True), ("int4 groups", True), ("fp8 blocks", True)]


def op_of(element):
    """The product for weights of an element, and what it rounds activations to."""
    return (float8_matmul, "e4m3") if element in FLOAT8 else (int8_matmul, "int8")


def rounded(x, groups, element):
    """x after rounding, from the codes' table in numpy."""
    codes, scales = quantize_rows(x, groups, element)
    values = np.asarray(codes.astype(jnp.float32)).reshape(len(x), groups, -1) * np.asarray(scales)[..., None]
    return values.reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("name,per_group", CASES)
def test_products_are_exact_for_the_rounded_activations(name, per_group):
    element, groups, options = FORMATS[name]
    product, rounds_to = op_of(element)
    w, dense = random_weight(element, groups, **options)
    x = normal(1, (1 if name == "int8" else 3, K))[0]

    @jax.jit
    def run(x, w):
        return product(x, w, per_group=per_group), product(x, w, per_group=per_group, impl="ref")

    want = rounded(x, groups if per_group else 1, rounds_to) @ dense.T
    assert_close(run(x, w), (want,) * 2)


def test_e4m3_codes_are_the_nearest():
    """Every row's largest entry becomes 448; each entry lies within half a step of its code."""
    x = normal(1, (5, 256))[0] * jnp.asarray([1e-30, 1e-3, 1.0, 1e3, 1e30])[:, None]
    codes, scales = quantize_rows(x, 2, "e4m3")
    assert codes.dtype == jnp.float8_e4m3fn and scales.shape == (5, 2)
    values, wide = np.float32(codes).reshape(5, 2, -1), np.float32(x).reshape(5, 2, -1) / np.asarray(scales)[..., None]
    assert (np.abs(values).max(-1) == 448).all()
    table = elements.table(elements.ELEMENTS["e4m3"])
    best = np.abs(table[np.isfinite(table)][None, None, None] - wide[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(values - wide), best, rtol=1e-4, atol=1e-4)


def test_the_gradient_goes_straight_through_the_rounding():
    w, dense = random_weight("e4m3", 2, rows=16)
    x, g = normal(1, (3, K), (3, dense.shape[0]))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(float8_matmul(x, w, per_group=True) * g)))(x)
    assert_close(gradient, g @ dense)


def test_float8_for_float8_needs_scales_of_its_own_rows():
    """The planted bug: another row's scale."""
    w, dense = random_weight("e4m3", 1)
    x = normal(1, (3, K))[0] * jnp.asarray([1.0, 10.0, 100.0])[:, None]
    want = rounded(x, 1, "e4m3") @ dense.T
    _, scales = quantize_rows(x, 1, "e4m3")
    y = jax.jit(float8_matmul)(x, w)
    assert_close(y, want)
    with pytest.raises(AssertionError):
        assert_close(y / scales * jnp.roll(scales, 1, 0), want)


# Groups of one tile and of two, half a tile, with and without scales of the rows' groups, more rows than a tile.
HOPPER = {
    "int8": ("int8", 2, 256, 3, True, {}),
    "int8 zeros, split": ("int8", 4, 512, 3, False, {"zeros": True}),
    "int8 wide groups": ("int8", 2, 512, 20, True, {}),
    "int8 groups of 64": ("int8", 2, 128, 3, True, {}),
    "fp8 blocks": ("e4m3", 2, 256, 3, True, {"rows": 16}),
}


@checks.needs_mosaic_gpu
@pytest.mark.smoke
@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_form_interpreted(name):
    element, groups, k, m, per_group, options = HOPPER[name]
    product, rounds_to = op_of(element)
    w, dense = random_weight(element, groups, n=64, k=k, **options)
    x = normal(1, (m, k))[0]
    y = product(x, w, per_group=per_group, impl="gpu", interpret=True)
    assert_close(y, rounded(x, groups if per_group else 1, rounds_to) @ dense.T)


# One group and several; a group over tiles, of one tile, and of parts of one; codes of 8, 4 and 2 bits.
TPU = {
    "int8 groups": ("int8", 2, 256, True, {"zeros": True}),
    "int8 wide groups": ("int8", 2, 2048, False, {}),
    "int4": ("int4", 4, 512, True, {"zeros": True}),
    "int4 narrow groups": ("int4", 8, 512, True, {}),
    "int4 one group": ("int4", 1, 512, False, {}),
    "int2": ("int2", 2, 1024, False, {}),
    "e2m1 wide groups": ("e2m1", 2, 1024, True, {}),
}


@pytest.mark.parametrize("name", TPU)
def test_the_tpu_form_interpreted(name):
    element, groups, k, per_group, options = TPU[name]
    w, dense = random_weight(element, groups, n=128, k=k, **options)
    x = normal(1, (3, k))[0]
    run = jax.jit(lambda x, w: int8_matmul(x, w, per_group=per_group, impl="tpu", interpret=True))
    assert_close(run(x, w), rounded(x, groups if per_group else 1, "int8") @ dense.T)


LLAMA = {  # form: format, product
    "tpu": ("int8 group=128", int8_matmul),
    "tpu, 4 bits": ("int4 group=64 zeros", int8_matmul),
    "gpu": ("int8 group=128", int8_matmul),
    "gpu, float8": ("fp8 128x128", float8_matmul),
}


def built(name, m):
    """The product of a case at a Llama's size, and its arguments' shapes."""
    form, product = LLAMA[name]
    n, k = arg_specs.SHAPES[1]
    impl = name.split(",")[0]
    return (
        lambda x, w: product(x, w, per_group=True, impl=impl),
        *checks.avals((m, k)),
        arg_specs.weight(form, n, k),
    )


@pytest.mark.parametrize("name", [name for name in LLAMA if name.startswith("tpu")])
def test_lowers_for_tpu(name):
    for m in (1, 512):
        checks.assert_lowers(*built(name, m), platform="tpu")


@checks.needs_mosaic_gpu
@pytest.mark.parametrize("name", [name for name in LLAMA if name.startswith("gpu")])
def test_lowers_for_hopper(name):
    for m in (1, 512):
        checks.assert_lowers(*built(name, m), platform="cuda")


@checks.needs_target("v5e")
@pytest.mark.parametrize("name", [name for name in LLAMA if name.startswith("tpu")])
def test_compiles_for_tpu(name):
    checks.assert_within_budget("acts8", name, targets.compile_for(*built(name, 64), target="v5e"))


@checks.needs_target("h200")
@pytest.mark.parametrize("m", [16, 512])
@pytest.mark.parametrize("name", [name for name in LLAMA if name.startswith("gpu")])
def test_compiles_for_hopper(name, m):
    build = targets.compile_for(*built(name, m), target="h200")
    checks.assert_within_budget("acts8", f"{name}, {m} rows", build)


@checks.needs_target("h200")
def test_float8_rows_meet_the_weight_in_8_bits():
    """XLA multiplies float8 by float8 on a GPU that can: nothing of the weight's shape is wider."""
    n, k = arg_specs.SHAPES[1]
    w = arg_specs.weight("fp8 128x128", n, k)
    w = dataclasses.replace(w, scales=jax.ShapeDtypeStruct((n, 1), jnp.float32))
    text = targets.compile_for(float8_matmul, *checks.avals((512, k)), w, target="h200").executable.as_text()
    assert set(re.findall(rf"(\w+)\[{n},{k}\]", text)) == {"f8e4m3fn"}
    assert re.search(r" dot\(| custom-call\(", text)


def test_forms_say_why_they_cannot_serve():
    x = jnp.ones((3, K))
    for impl, element, groups, words in (
        ("tpu", "int8", 1, "one product of XLA's"),
        ("tpu", "int8", 4, "multiples of 128 lanes"),
        ("gpu", "int8", 4, "jax 0.11.2|48 outputs"),
    ):
        with pytest.raises(UnsupportedError, match=f"int8_matmul: impl='{impl}'.*({words})"):
            int8_matmul(x, random_weight(element, groups)[0], impl=impl)
    with pytest.raises(UnsupportedError, match="float8_matmul: impl='tpu'.*multiplies int8"):
        float8_matmul(x, random_weight("e4m3", 1)[0], impl="tpu")
    with pytest.raises(UnsupportedError, match="impl='tensor_cores'.*sums whole rows"):
        float8_matmul(x, random_weight("e4m3", 2)[0], impl="tensor_cores")


def test_elements_that_do_not_fit_are_refused():
    x = jnp.ones((3, K))
    with pytest.raises(ArgumentError, match="int8_matmul: element: got 'e4m3'"):
        int8_matmul(x, random_weight("e4m3", 1)[0])
    with pytest.raises(ArgumentError, match="float8_matmul: element: got 'int8'"):
        float8_matmul(x, random_weight("int8", 1)[0])


@pytest.mark.parametrize("element", ["int4", "e4m3"])
def test_rows_of_nan_and_zero_stay_alone(element):
    w, _ = random_weight(element, 4)
    x = normal(1, (4, K))[0].at[1].set(jnp.nan).at[2].set(0.0)
    y = np.asarray(jax.jit(op_of(element)[0])(x, w))
    assert np.isnan(y[1]).all() and not y[2].any() and np.isfinite(y[[0, 3]]).all()


def test_no_dense_copy_of_the_weight_is_made():
    for element, groups in (("int8", 1), ("int4", 16)):
        assert_no_dense_copy(int8_matmul, element, groups)
