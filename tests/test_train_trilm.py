"""TriLM: three values a matrix in training and after export, straight-through gradients, the schedule's two steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops
from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.step import Step
from jaxinfer.quant.quantized import QuantizedArray
from jaxinfer.quant.tree import leaves
from jaxinfer.train import data, lm, loop, trilm

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=64, max_length=64,
    tie_embeddings=True,
)  # fmt: skip
STEP = Step(CONFIG)
STEPS = 40


@pytest.fixture(scope="module")
def recipe():
    tokens = np.tile(np.random.default_rng(0).integers(1, 64, 29), 60).astype(np.uint16)
    stream = data.Stream(tokens, tokens, (data.Stage(0, 4, 32),), 0)
    rate = trilm.schedule(1e-2, steps=STEPS, warmup=5)
    return loop.Recipe(
        objective=trilm.TernaryNextToken(STEP), data=stream, optimizer=trilm.optimizer(rate, steps=STEPS),
        schedule=rate, identity={"name": "toy"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    state = loop.init_state(STEP.init(jax.random.key(0)), recipe, jax.random.key(1))
    folder = tmp_path_factory.mktemp("trilm")
    state = loop.train(recipe, state, loop.LoopConfig(steps=STEPS, curve=False), folder)
    return state.params, [row["loss"] for row in loop.record.read(folder / "metrics.jsonl")]


def matrices(params):
    return {path: leaf for path, leaf in leaves(params) if path.startswith("layers") and leaf.ndim > 1}


def check_three_values(params, exported):
    for path, leaf in matrices(params).items():
        found = dict(leaves(exported))[path]
        if path.endswith("router"):
            assert found is leaf
            continue
        assert isinstance(found, QuantizedArray) and found.element == "int2"
        each = np.asarray(ops.materialize(found)).reshape(-1, *leaf.shape[-2:])
        assert all(len(np.unique(matrix)) == 3 for matrix in each)
        gamma = np.abs(np.asarray(leaf)).mean((-2, -1)).reshape(-1)
        np.testing.assert_allclose([np.abs(m).max() for m in each], gamma, rtol=1e-6)


@pytest.mark.slow
def test_each_expert_has_its_own_three_values_and_routers_stay():
    config = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, expert_size=32)
    params = Step(config).init(jax.random.key(0))
    check_three_values(params, trilm.export(params))
    ternary = trilm.ternary_params(params)
    assert ternary["layers_0"]["mlp"]["router"] is params["layers_0"]["mlp"]["router"]
    assert [len(np.unique(np.round(expert, 6))) for expert in ternary["layers_0"]["mlp"]["up"]] == [3] * 4


@pytest.mark.slow
def test_the_exported_model_has_three_values_a_matrix_and_computes_what_training_computed(trained, recipe):
    params, losses = trained
    assert losses[-1] < losses[0] / 2
    exported = trilm.export(params)
    check_three_values(params, exported)
    for name in ("embedding", "final_norm"):
        assert exported[name] is params[name]
    batch = recipe.data(0)
    token_losses = jax.jit(lambda params: lm.token_losses(STEP, params, batch))
    there = token_losses(exported)
    np.testing.assert_allclose(there, token_losses(trilm.ternary_params(params)), atol=1e-4)
    latent = token_losses(params)  # a training that forgot the three values would be seen
    assert float(jnp.abs(latent - there).max()) > 0.1


def test_gradients_go_straight_through():
    w = jax.random.normal(jax.random.key(0), (3, 8, 5))
    values, pull = jax.vjp(trilm.ternarize, w)
    cotangent = jax.random.normal(jax.random.key(1), w.shape)
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)
    gamma = np.abs(np.asarray(w)).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(values, gamma * np.round(np.clip(w / gamma, -1, 1)), atol=1e-6)
    zeros = jax.vjp(trilm.ternarize, jnp.zeros((4, 4)))
    assert not np.asarray(zeros[0]).any() and np.isfinite(zeros[1](jnp.ones((4, 4)))[0]).all()


def test_the_rate_drops_at_the_half_and_decay_ends_at_two_thirds():
    rate = trilm.schedule(3.0, steps=60, lower=1.0, warmup=6)
    np.testing.assert_allclose([rate(i) for i in (0, 5, 29, 30, 59)], [0.5, 3 * 55 / 60, 3 * 31 / 60, 0.5, 1 / 60])
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    optimizer = trilm.optimizer(lambda count: 1.0, steps=60)
    state = optimizer.init(params)
    moved = []
    for _ in range(60):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        assert not np.asarray(updates["norm"]).any()
        moved.append(float(updates["w"][0, 0]))
    np.testing.assert_allclose(moved, [-0.1] * 40 + [0.0] * 20)


def test_bad_settings_are_refused():
    for wrong in ({"lower": 2.0}, {"lower": 0.0}, {"warmup": 0}, {"warmup": 30}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            trilm.schedule(1.0, **{"steps": 60, **wrong})
