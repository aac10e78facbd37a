"""Mixtures of experts keep rows apart: a row's bits do not depend on what its neighbours hold, or on their order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, quant
from jaxinfer.models import ModelConfig, Step

STEP = Step(
    ModelConfig(
        vocab_size=48,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_size=48,
        max_length=32,
        num_experts=4,
        experts_per_token=2,
        expert_size=24,
    )
)
ROWS, LENGTH = 5, 3  # an odd number of token-expert pairs: no tile is full


@jax.jit
def logits(params, x):
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), x.shape[:2])
    return STEP.head(params, STEP(params, x, positions)[0].hidden)


@pytest.fixture(scope="module", params=["arrays", "lora over int8"])
def model(request):
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda w: np.float32(random.normal(0.1, 0.3, w.shape)), nn.unbox(STEP.abstract()))
    if request.param != "arrays":
        params = quant.apply(params, [(".*/mlp/.*", quant.Int8())])
        params = jax.tree.map(jnp.asarray, quant.lora(params, [".*/mlp/(gate|down)"], 2, jax.random.key(0)))
    x = np.float32(random.normal(size=(ROWS, LENGTH, 32)))
    return params, x, np.asarray(logits(params, x))


def test_a_row_of_nan_reaches_no_other_row(model):
    params, x, expected = model
    for bad in range(ROWS):
        others = [i for i in range(ROWS) if i != bad]
        planted = x.copy()
        planted[bad] = np.nan
        got = np.asarray(logits(params, planted))
        assert np.isnan(got[bad]).all()
        np.testing.assert_array_equal(got[others], expected[others])


def test_neighbours_and_order_change_no_bit(model):
    params, x, expected = model
    random = np.random.default_rng(1)
    for _ in range(5):
        order, other = random.permutation(ROWS), np.float32(random.normal(size=x.shape))
        np.testing.assert_array_equal(logits(params, x[order]), expected[order])
        other[2] = x[2]
        np.testing.assert_array_equal(logits(params, other)[2], expected[2])


def test_ragged_dot_keeps_rows_apart_wherever_they_are_sorted():
    random = np.random.default_rng(0)
    w = random.normal(size=(3, 24, 17)).astype(np.float32)
    row = random.normal(size=24).astype(np.float32)
    product = jax.jit(ops.ragged_dot)
    bits = set()
    for at in range(11):
        for sizes in ([11, 0, 0], [at + 1, 10 - at, 0]):
            x = random.normal(size=(11, 24)).astype(np.float32)
            x[at], x[(at + 1) % 11] = row, np.nan
            bits.add(np.asarray(product(x, w, jnp.array(sizes, jnp.int32)))[at].tobytes())
    assert len(bits) == 1
