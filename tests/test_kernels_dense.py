"""Products of few rows with dense weights: every form is the product, and the form follows rows, dtype and platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core.dispatch import choose, why_not
from jaxinfer.pallas_kernels.matmul.dense import FORMS, dense
from jaxinfer.pallas_kernels.matmul.dense.blocked import SMALLEST

pytestmark = pytest.mark.smoke


def operands(rows, inner, outer, dtype="float32"):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(*rows, inner), (inner, outer)]))
    return x.astype(dtype), (w / np.sqrt(inner)).astype(dtype)


@pytest.mark.parametrize("impl", ["split", "plain", None])
def test_every_form_is_the_product(impl):
    x, w = operands((1, 1), 256, 192)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    got = dense(x, w, impl=impl)
    assert got.shape == (1, 1, 192) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=2e-6)
    np.testing.assert_allclose(dense(x, w, impl="ref"), exact, atol=2e-6)
    wrong = exact - np.asarray(x, np.float64)[..., :128] @ np.asarray(w, np.float64)[:128]
    assert np.abs(wrong - got).max() > 0.1, "a form that loses half of the sum would pass"


def test_gradients_agree():
    x, w = operands((1,), 256, 128)
    split, plain = (
        jax.grad(lambda x, w, impl=impl: (dense(x, w, impl=impl) ** 2).sum(), (0, 1))(x, w)
        for impl in ("split", "plain")
    )
    for a, b in zip(split, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_form_follows_the_call():
    assert choose(FORMS, (1, 256, 768, "float32"), "cpu").name == "split"
    for call in [(2, 256, 768, "float32"), (1, 256, 768, "bfloat16"), (1, 255, 768, "float32"), (1, 16, 16, "float32")]:
        assert choose(FORMS, call, "cpu").name == "plain"
    for platform in ("tpu", "cuda"):
        assert choose(FORMS, (1, 256, 768, "float32"), platform).name == "plain"
    assert why_not(FORMS, (1, 256, 768, "float32"), "tpu")["split"] == "code for cpu"


@pytest.mark.parametrize(
    ("x", "w", "impl", "message"),
    [
        (jnp.ones((2, 8)), jnp.ones((4, 8)), None, r"dense: w: got \[4, 8\].*K = 8"),
        (jnp.ones(()), jnp.ones((4, 8)), None, "dense: x: got"),
        (jnp.ones((2, 8)), jnp.ones((8,)), None, "dense: w: got"),
        (jnp.ones((2, 8)), jnp.ones((8, 4), jnp.bfloat16), None, "dense: w: got bfloat16, accepts the dtype of x"),
        (jnp.ones((2, 8)), jnp.ones((8, 4)), "fast", "accepts 'split', 'plain', 'ref'"),
        (jnp.ones((2, 256)), jnp.ones((256, 256)), "split", "one row, got 2"),
        (jnp.ones((1, 8)), jnp.ones((8, 4)), "split", f"takes {SMALLEST} or more"),
    ],
)
def test_bad_input(x, w, impl, message):
    with pytest.raises(ValueError, match=message):
        dense(x, w, impl=impl)
