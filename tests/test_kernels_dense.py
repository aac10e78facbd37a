"""Products of few rows with dense weights: every form is the product, and the form follows rows, dtype and platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels._core.dispatch import choose, why_not
from jaxinfer.pallas_kernels.matmul.dense import FORMS, TRANSPOSED_FORMS, Call, blocked, dense, dense_transposed
from jaxinfer.pallas_kernels.matmul.dense.blocked import SMALLEST

pytestmark = pytest.mark.smoke

K, N = 256, 192
OPS = {"dense": (dense, FORMS), "dense_transposed": (dense_transposed, TRANSPOSED_FORMS)}


def operands(rows, dtype="float32", inner=K, outer=N):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(*rows, inner), (inner, outer)]))
    return x.astype(dtype), (w / np.sqrt(inner)).astype(dtype)


# The op, rows, dtype; each runs in every form that serves it, and in the one that is chosen.
CALLS = [
    ("dense", (1, 1), "float32"),
    ("dense", (1,), "bfloat16"),
    ("dense", (2, 3), "bfloat16"),
    ("dense_transposed", (1,), "float32"),
    ("dense_transposed", (2,), "float32"),
    ("dense_transposed", (1, 7), "float32"),
    ("dense_transposed", (1,), "bfloat16"),
]


@pytest.mark.parametrize("name,rows,dtype", CALLS)
def test_every_form_is_the_product(name, rows, dtype):
    op, forms_of = OPS[name]
    x, w = operands(rows, dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    call = Call(int(np.prod(rows)), K, N, dtype)
    forms = [form.name for form in forms_of if not form.refuses(call)]
    w = w if op is dense else w.T
    results = jax.jit(lambda x, w: [op(x, w, impl=impl) for impl in (*forms, None)])(x, w)
    tolerance = 2e-6 if dtype == "float32" else 2e-2
    for impl, y in zip((*forms, None), results, strict=True):
        assert y.shape == (*rows, N) and y.dtype == dtype
        np.testing.assert_allclose(np.float64(y), exact, atol=tolerance, err_msg=str(impl))
    half = np.asarray(x, np.float64)[..., : K // 2] @ np.asarray(operands(rows, dtype)[1], np.float64)[: K // 2]
    assert np.abs(half - exact).max() > 0.1, "a form that loses half of the sum would pass"


def test_gradients_agree():
    """Reverse and forward mode through the sums, and through the halves, against the plain product."""

    def derivatives(op, impl, x, w):
        def loss(x, w):
            return (op(x, w, impl=impl) ** 2).sum()

        return *jax.grad(loss, (0, 1))(x, w), jax.jvp(loss, (x, w), (x, w))[1]

    (x1, w), (x3, _) = operands((1,)), operands((3,))
    cases = [(dense, "halves", x1, w), (dense_transposed, "sums", x3, w.T)]
    run = jax.jit(lambda: [[derivatives(op, i, x, w) for i in (impl, "plain")] for op, impl, x, w in cases])
    for ours, plain in run():
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rows_stay_alone():
    x, w = operands((4,))
    y = jax.jit(lambda x, w: dense_transposed(x, w, impl="sums"))
    alone, beside = (np.asarray(y(rows, w.T)) for rows in (x, x.at[1].set(jnp.nan)))
    assert np.isnan(beside[1]).all()
    np.testing.assert_array_equal(beside[[0, 2, 3]], alone[[0, 2, 3]])


@pytest.mark.parametrize("bug", [False, True])
def test_sums_do_not_repeat_their_rows_in_memory(bug, monkeypatch):
    """Two products of the same rows, as of a gated MLP: XLA would make `[M, N, K]` of the rows once, for both."""
    if bug:
        monkeypatch.setattr(blocked.lax, "optimization_barrier", lambda operands: operands)
    m, k, n = 7, 192, 256

    def gated(x, scale, gate, up):
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * scale
        return jax.nn.silu(dense_transposed(x, gate, impl="sums")) * dense_transposed(x, up, impl="sums")

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((m, k), (k,), (n, k), (n, k))]
    memory = jax.jit(gated).lower(*shapes).compile().memory_analysis()
    assert (memory.temp_size_in_bytes > 4 * m * n * k) == bug
    assert bug or memory.temp_size_in_bytes < 4 * n * k


def test_the_form_follows_the_call():
    assert choose(FORMS, Call(1, 256, 768, "float32"), "cpu").name == "halves"
    assert choose(FORMS, Call(8, 256, 768, "bfloat16"), "cpu").name == "wide"
    for call in [(2, 256, 768), (1, 255, 768), (1, 16, 16)]:
        assert choose(FORMS, Call(*call, "float32"), "cpu").name == "plain"
    names = {1: "halves", 2: "sums", 16: "sums", 64: "sums", 65: "plain"}
    for rows, name in names.items():
        assert choose(TRANSPOSED_FORMS, Call(rows, 256, 768, "float32"), "cpu").name == name
    for platform in ("tpu", "cuda"):
        for _, forms in OPS.values():
            assert choose(forms, Call(1, 256, 768, "float32"), platform).name == "plain"
    assert why_not(FORMS, Call(1, 256, 768, "float32"), "tpu")["halves"] == "code for cpu"


@pytest.mark.parametrize(
    ("name", "x", "w", "impl", "message"),
    [
        ("dense", (2, 8), (4, 8), None, r"dense: w: got \[4, 8\].*K = 8"),
        ("dense", (), (4, 8), None, "dense: x: got"),
        ("dense", (2, 8), (8,), None, "dense: w: got"),
        ("dense", (2, 8), (8, 4), "fast", "accepts 'halves', 'wide', 'plain', 'ref'"),
        ("dense", (2, 256), (256, 256), "halves", "one row, got 2"),
        ("dense", (1, 8), (8, 4), "halves", f"takes {SMALLEST} or more"),
        ("dense", (1, 8), (8, 4), "wide", "for bfloat16, got float32"),
        ("dense_transposed", (2, 8), (8, 4), None, r"dense_transposed: w: got \[8, 4\].*K = 8"),
        ("dense_transposed", (65, 256), (256, 256), "sums", "2 to 64 rows, got 65"),
    ],
)
def test_bad_input(name, x, w, impl, message):
    op, _ = OPS[name]
    with pytest.raises(ValueError, match=message):
        op(jnp.ones(x), jnp.ones(w), impl=impl)
    with pytest.raises(ValueError, match="got bfloat16, accepts the dtype of x"):
        op(jnp.ones((2, 8)), jnp.ones((8, 8), jnp.bfloat16))
