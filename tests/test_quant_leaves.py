"""Contract 1, leaf by leaf: every rule of every leaf type equals "materialize, then the array rule"."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, quant
from jaxinfer.errors import ConfigError, InputError

pytestmark = pytest.mark.smoke

K, N, E, M = 24, 16, 3, 10
SIZES = jnp.array([4, 0, 6], jnp.int32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def int8(group, axis):
    return lambda w: quant.Int8(group=group).quantize(w, axis=axis)


def lora(base):
    def build(w):
        *lead, rows, columns = w.shape
        return quant.LoraArray(base(w), normal(5, *lead, rows, 2), normal(6, *lead, 2, columns), 0.5)

    return build


def extended(axis, base):
    def build(w):
        kept, extra = jnp.split(w, [w.shape[axis] - 3], axis)
        return quant.ExtendedRows(base(kept), extra, axis)

    return build


def array(w):
    return w


CHANNEL, TABLE = int8(None, -2), int8(None, -1)
FORMATS = {
    "int8": CHANNEL,
    "int8-table": TABLE,
    "int8-groups": int8(4, -2),
    "int8-table-groups": int8(4, -1),
    "lora": lora(array),
    "lora-int8": lora(CHANNEL),
    "lora-lora": lora(lora(TABLE)),
    "rows": extended(-2, array),
    "rows-lora-int8": extended(-2, lora(TABLE)),
    "columns": extended(-1, array),
    "columns-int8": extended(-1, CHANNEL),
    "lora-rows": lora(extended(-2, array)),
}
USES = {  # use: (function of x and w, shape of w)
    "dot": (ops.dot, (K, N)),
    "dot_transposed": (ops.dot_transposed, (N, K)),
    "take": (lambda x, w: ops.take(w, jnp.array([[0, 23, 20], [7, 21, 99]])), (K, N)),
    "ragged_dot": (lambda x, w: ops.ragged_dot(x, w, SIZES), (E, K, N)),
    "einsum": (lambda x, w: ops.einsum("mk,kn->mn", x, w), (K, N)),
}


@jax.jit
def apply_arrays(x, weights):
    return {use: USES[use][0](x, w) for use, w in weights.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_every_use_equals_the_materialized_weight(name):
    """Dense products, tied heads, embedding rows, experts, einsum: jitted, against arrays of the same values."""

    @jax.jit
    def apply_leaves(x, arrays):
        results, dense = {}, {}
        for use, (function, shape) in USES.items():
            w = FORMATS[name](arrays[use])
            w.check()
            assert w.shape == shape and w.ndim == len(shape) and w.dtype == jnp.float32 and ops.is_weight(w)
            results[use], dense[use] = function(x, w), ops.materialize(w)
            assert dense[use].shape == shape and dense[use].dtype == w.dtype
        return results, dense

    x = normal(1, M, K)
    got, dense = apply_leaves(x, {use: normal(2, *shape) for use, (_, shape) in USES.items()})
    for use, expected in apply_arrays(x, dense).items():
        assert got[use].dtype == expected.dtype and got[use].shape == expected.shape
        np.testing.assert_allclose(got[use], expected, atol=2e-5, err_msg=use)


@pytest.mark.parametrize("use", ["dot", "dot_transposed"])
def test_scales_on_the_wrong_axis_are_caught(use):
    function = jax.jit(USES[use][0])
    w = quant.Int8().quantize(normal(2, K, K))
    planted = dataclasses.replace(w, scales=w.scales.T, axis=-1)
    planted.check()  # nothing contradicts itself: only the comparison can see it
    x = normal(1, 5, K)
    np.testing.assert_allclose(function(x, w), function(x, ops.materialize(w)), atol=2e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(function(x, planted), function(x, ops.materialize(w)), atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_models_keep_their_dtype(dtype):
    w = quant.Int8(scales="bfloat16").quantize(normal(2, K, N).astype(dtype))
    x = normal(1, 5, K).astype(dtype)
    assert w.dtype == dtype and w.scales.dtype == jnp.bfloat16
    y, row, dense = jax.jit(lambda x, w: (ops.dot(x, w), ops.take(w, jnp.array([1])), ops.materialize(w)))(x, w)
    assert y.dtype == row.dtype == dense.dtype == dtype
    np.testing.assert_allclose(y, np.float32(x) @ np.float32(dense), atol=0.1)


# Relative squared errors of round-to-nearest on N(0, 1), symmetric grid absmax / (2^(bits-1) - 1): int4 with groups of
# 32, 64 and 128 measured independently (methods notes, quantization 1.1); int8 is far below.
@pytest.mark.parametrize("bits,group,anchor", [(4, 32, 0.00941), (4, 64, 0.01160), (4, 128, 0.01379)])
def test_error_of_the_grid_matches_its_anchor(bits, group, anchor):
    w = normal(3, 512, 512)
    error = quant.relative_error(w, quant.Int8(bits=bits, group=group).quantize(w))
    assert abs(error / anchor - 1) < 0.02


def test_round_to_nearest_known_answer_and_bound():
    w = jnp.array([[127.0, 0.0], [-63.5, 0.0], [62.5, 0.0], [0.4, 0.0]])
    q = quant.Int8().quantize(w)
    assert q.codes[:, 0].tolist() == [127, -64, 62, 0]  # ties go to even
    assert q.codes[:, 1].tolist() == [0] * 4 and q.scales.tolist()[0][0] == 1.0
    assert jnp.isfinite(ops.materialize(q)).all()
    w = normal(4, 64, 32)
    for spec in (quant.Int8(), quant.Int8(group=8), quant.Int8(bits=3), quant.Int8(axis=-1)):
        q = spec.quantize(w)
        scales = np.repeat(q.scales, w.shape[q.axis] // q.groups, q.axis)
        assert (np.abs(np.asarray(q.codes) * scales - w) <= scales / 2 * (1 + 1e-6)).all()
        assert np.abs(q.codes).max() == 2 ** (spec.bits - 1) - 1
    tiny = quant.Int8().quantize(jnp.full((4, 2), 1e-38))  # its scale would be subnormal, which the CPU flushes to zero
    assert jnp.isfinite(ops.materialize(tiny)).all()


def test_layers_stacked_for_a_scan_or_a_map_keep_their_format():
    layers = [quant.LoraArray(int8(4, -2)(normal(i, K, K)), normal(9, K, 2), normal(8, 2, K)) for i in range(3)]
    stack = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    assert stack.shape == (3, K, K)
    x = normal(7, 5, K)

    @jax.jit
    def loop(x, layers):
        outputs = [ops.dot(x, w) for w in layers]
        for w in layers:
            x = jnp.tanh(ops.dot(x, w))
        return x, jnp.stack(outputs)

    @jax.jit
    def scan(x, stack):
        y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(ops.dot(y, w)), None), x, stack)
        return y, jax.vmap(ops.dot, (None, 0))(x, stack)

    for got, expected in zip(scan(x, stack), loop(x, layers), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gradients_reach_the_factors_only():
    w = lora(array)(normal(2, K, N))
    x = normal(1, 5, K)
    uses = [lambda w: ops.dot(x, w), lambda w: ops.dot_transposed(x[:, :N], w), ops.materialize]
    gradients = jax.jit(lambda w: [jax.grad(lambda w, use=use: jnp.sum(use(w) ** 2))(w) for use in uses])(w)
    for grads in gradients:
        assert not np.any(grads.base) and np.any(grads.a) and np.any(grads.b)
    dense = jax.jit(jax.grad(lambda d: jnp.sum((x @ d) ** 2)))(ops.materialize(w))
    dense, a, b = w.scale * np.asarray(dense), np.asarray(w.a), np.asarray(w.b)
    np.testing.assert_allclose(gradients[0].a, dense @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradients[0].b, a.T @ dense, rtol=1e-4, atol=1e-3)


def test_logical_axes_follow_the_arrays():
    w = lora(int8(4, -2))(normal(2, K, N))
    axes = quant.map_axes(w, ("embed", "mlp"))
    assert axes.base.codes == axes.base.scales == ("embed", "mlp")
    assert axes.a == ("embed", None) and axes.b == (None, "mlp")
    assert quant.map_axes(CHANNEL(normal(2, E, K, N)), ("experts", "embed", "mlp")).scales == ("experts", None, "mlp")
    assert quant.map_axes(TABLE(normal(2, K, N)), ("vocab", "embed")).scales == ("vocab", None)
    assert quant.map_axes(extended(-2, TABLE)(normal(2, K, N)), ("vocab", "embed")).extra == (None, "embed")
    assert quant.map_axes(normal(2, 3), ("embed",)) == ("embed",)


@pytest.mark.parametrize(
    "options,word",
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"bits": 4.0}, "bits"),
        ({"group": 0}, "group"),
        ({"group": True}, "group"),
        ({"axis": 0}, "axis"),
        ({"scales": "int8"}, "scales"),
    ],
)
def test_bad_specs_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        quant.Int8(**options)


def test_weights_that_cannot_be_quantized_are_refused():
    with pytest.raises(ConfigError, match="group 7 does not divide"):
        quant.Int8(group=7).quantize(normal(2, K, N))
    with pytest.raises(InputError, match="int32"):
        quant.Int8().quantize(jnp.zeros((K, N), jnp.int32))
    with pytest.raises(InputError, match="not finite"):
        quant.Int8().quantize(jnp.full((K, N), jnp.nan))
    with pytest.raises(InputError, match="not finite"):
        quant.Int8(scales="float16").quantize(jnp.full((K, N), 1e8))


def test_a_product_with_the_wrong_shape_names_it():
    with pytest.raises(InputError, match=r"\(24, 16\)"):
        ops.dot(normal(1, 5, N), CHANNEL(normal(2, K, N)))
