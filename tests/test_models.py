"""The decoder: cached equals uncached in any split, for every family option; experts, masks, taps, bad shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step, config_from_hf, config_to_hf
from jaxinfer.models.moe import route

pytestmark = pytest.mark.smoke

BASE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48, max_length=64
)
VARIANTS = {
    "llama": BASE,
    "bias": dataclasses.replace(BASE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qk_norm": dataclasses.replace(BASE, qk_norm=True),
    "window": dataclasses.replace(BASE, windows=(4, None)),
    "gemma": dataclasses.replace(
        BASE,
        norm_offset=1.0,
        sandwich_norms=True,
        embedding_scale=32**0.5,
        attention_softcap=5.0,
        final_softcap=3.0,
        activation="gelu_pytorch_tanh",
        windows=(4, None),
        tie_embeddings=True,
    ),
    "experts": dataclasses.replace(BASE, num_experts=4, experts_per_token=2, expert_size=24, dense_layers=(0,)),
    **{
        name: dataclasses.replace(BASE, num_layers=1, position=name)
        for name in ("alibi", "t5", "learned", "sinusoidal", "none")
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    step = Step(VARIANTS[request.param])
    return step, params_of(step)


def params_of(step):
    """Random params, large enough that attention and routing are far from uniform; numpy compiles nothing."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(step.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(leaf.ndim == 1, 0.2, leaf.shape), jnp.float32), shapes)


@functools.partial(jax.jit, static_argnames=("step", "taps"))
def run(step, params, ids, at, mask=None, taps=()):
    """Hidden states and taps without a cache."""
    output, block = step(params, ids, at, mask=mask, taps=taps)
    assert block is None
    return output


@functools.partial(jax.jit, static_argnames=("step",))
def run_cached(step, params, ids, at, cache):
    """Hidden states of one chunk, and the cache with the chunk committed."""
    output, block = step(params, ids, at, cache)
    batch, size = ids.shape
    path = jnp.broadcast_to(jnp.arange(size), (batch, size))
    return output.hidden, kv.commit(cache, block, path, jnp.full(batch, size, jnp.int32))


def positions(batch: int, start: int, stop: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start))


IDS = np.random.default_rng(2).integers(0, 61, (2, 12))


@pytest.mark.parametrize(
    "borders",
    [pytest.param((0, 6, 12), id="halves", marks=pytest.mark.slow), pytest.param((0, 6, *range(7, 13)), id="steps")],
)
def test_cached_equals_uncached_in_any_split(model, borders):
    step, params = model
    expected = run(step, params, IDS, positions(2, 0, 12)).hidden
    cache, got = jax.jit(step.new_cache, static_argnums=(0, 1))(2, 12), []
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        hidden, cache = run_cached(step, params, IDS[:, start:stop], positions(2, start, stop), cache)
        got.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, atol=2e-5)


def test_padding_changes_nothing(model):
    step, params = model
    whole = run(step, params, IDS, positions(2, 0, 12)).hidden
    padded = jnp.where(jnp.arange(12) < jnp.array([[6], [12]]), positions(2, 0, 12), -1)
    ragged = run(step, params, np.where(padded < 0, 60, IDS), padded).hidden
    np.testing.assert_allclose(ragged[0, :6], whole[0, :6], atol=1e-5)
    np.testing.assert_allclose(ragged[1], whole[1], atol=1e-5)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(model):
    step, params = model
    packed_positions = jnp.concatenate([positions(2, 0, 4), positions(2, 0, 8)], 1)
    segments = ops.Segments(jnp.array([[0] * 4 + [1] * 8] * 2))
    packed = run(step, params, IDS, packed_positions, segments).hidden
    alone = jnp.where(packed_positions == jnp.arange(12) - 4, packed_positions, -1)  # the first document as padding
    np.testing.assert_allclose(packed[:, 4:], run(step, params, IDS, alone).hidden[:, 4:], atol=1e-5)


def test_taps_and_embedding_inputs():
    step = Step(BASE)
    params = params_of(step)
    ids = jnp.arange(6)[None]
    output = run(step, params, ids, positions(1, 0, 6), taps=(0, 1))
    embedded = run(step, params, params["embedding"][ids], positions(1, 0, 6))
    assert [tap.shape for tap in output.taps] == [(1, 6, 32)] * 2
    np.testing.assert_allclose(output.hidden, embedded.hidden, atol=1e-6)


def test_bidirectional_mask_sees_ahead():
    step = Step(BASE)
    params = params_of(step)
    ids = jnp.arange(6)[None]
    changed = ids.at[0, 5].set(60)
    hidden = [run(step, params, x, positions(1, 0, 6), ops.Bidirectional()).hidden for x in (ids, changed)]
    assert jnp.abs(hidden[0][0, 0] - hidden[1][0, 0]).max() > 1e-6
    causal = [run(step, params, x, positions(1, 0, 6)).hidden for x in (ids, changed)]
    np.testing.assert_array_equal(causal[0][0, :5], causal[1][0, :5])


def test_routing_against_a_loop():
    logits = jax.random.normal(jax.random.key(0), (7, 5))
    values = jax.random.normal(jax.random.key(1), (5, 7, 3))  # what expert e makes of token n
    routing = route(logits, 2, normalize=True)
    expert_of_row = np.repeat(np.arange(5), np.asarray(routing.group_sizes))
    got = routing.gather(values[expert_of_row, routing.token])
    probability = np.asarray(jax.nn.softmax(logits))
    for n in range(7):
        best = np.argsort(-probability[n], kind="stable")[:2]
        weight = probability[n, best] / probability[n, best].sum()
        np.testing.assert_allclose(got[n], sum(w * values[e, n] for w, e in zip(weight, best, strict=True)), rtol=1e-5)


def test_wrong_shape_names_the_weight():
    step = Step(BASE)
    params = params_of(step)
    params["layers_1"]["mlp"]["up"] = jnp.zeros((32, 47))
    with pytest.raises(InputError, match=r"layers_1/mlp/up: got shape \(32, 47\), the configuration needs \(32, 48\)"):
        step(params, jnp.zeros((1, 2), jnp.int32), positions(1, 0, 2))


@pytest.mark.parametrize("name", ["alibi", "t5", "none"])
def test_own_configs_round_trip(name):
    config = VARIANTS[name]
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"num_key_value_heads": 3}, "no multiple of num_kv_heads"),
        ({"hidden_act": "swish9"}, "hidden_act 'swish9' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs 'factor'"),
        ({"rope_scaling": {"rope_type": "wobble"}}, "rope_type 'wobble' is not known"),
        ({"quantization_config": {"bits": 4}}, "pre-quantized"),
    ],
)
def test_bad_configs_are_named(change, message):
    hf = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    hf |= {"intermediate_size": 8}
    with pytest.raises(ConfigError, match=message):
        config_from_hf(hf | change)
