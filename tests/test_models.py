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

BASE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_size=48, max_length=64
)
VARIANTS = {
    "llama": BASE,
    "tied": dataclasses.replace(BASE, tie_embeddings=True),
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
    **{name: dataclasses.replace(BASE, position=name) for name in ("alibi", "t5", "learned", "sinusoidal", "none")},
}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    step = Step(VARIANTS[request.param])
    leaves, tree = jax.tree.flatten(step.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # large enough weights that attention and routing are far from uniform
    return step, tree.unflatten([w + 0.2 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, static_argnames=("step", "taps"))
def run(step, params, ids, at, mask=None, taps=()):
    """Hidden states and taps without a cache."""
    output, block = step(params, ids, at, mask=mask, taps=taps)
    assert block is None
    return output


@functools.partial(jax.jit, static_argnames=("step",))
def run_cached(step, params, ids, at, cache):
    """Logits of one chunk, and the cache with the chunk committed."""
    output, block = step(params, ids, at, cache)
    batch, size = ids.shape
    path = jnp.broadcast_to(jnp.arange(size), (batch, size))
    return step.head(params, output.hidden), kv.commit(cache, block, path, jnp.full(batch, size, jnp.int32))


def positions(batch: int, start: int, stop: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(start, stop), (batch, stop - start))


def run_in_chunks(step, params, ids, borders):
    """Logits of `ids` fed in chunks, each committed before the next."""
    batch, length = ids.shape
    cache, logits = step.new_cache(batch, length), []
    for start, stop in zip(borders[:-1], borders[1:], strict=True):
        chunk, cache = run_cached(step, params, ids[:, start:stop], positions(batch, start, stop), cache)
        logits.append(chunk)
    return jnp.concatenate(logits, 1)


def test_cached_equals_uncached_in_any_split(model):
    step, params = model
    ids = jax.random.randint(jax.random.key(2), (2, 13), 0, 61)
    expected = step.head(params, run(step, params, ids, positions(2, 0, 13)).hidden)
    for borders in ((0, 13), (0, 5, 6, 13)):
        np.testing.assert_allclose(run_in_chunks(step, params, ids, borders), expected, atol=2e-5)


def test_padding_changes_nothing(model):
    step, params = model
    ids = jax.random.randint(jax.random.key(3), (2, 9), 0, 61)
    alone = run(step, params, ids[:1, :6], positions(1, 0, 6))
    padded = jnp.where(jnp.arange(9) < jnp.array([[6], [9]]), positions(2, 0, 9), -1)
    ragged = run(step, params, ids, padded)
    np.testing.assert_allclose(ragged.hidden[0, :6], alone.hidden[0], atol=1e-5)


def test_packed_documents_do_not_see_each_other(model):
    step, params = model
    ids = jax.random.randint(jax.random.key(4), (1, 10), 0, 61)
    packed_positions = jnp.concatenate([positions(1, 0, 4), positions(1, 0, 6)], 1)
    segments = ops.Segments(jnp.array([[0] * 4 + [1] * 6]))
    packed = run(step, params, ids, packed_positions, segments)
    second = run(step, params, ids[:, 4:], positions(1, 0, 6))
    np.testing.assert_allclose(packed.hidden[:, 4:], second.hidden, atol=1e-5)


def test_taps_and_embedding_inputs():
    step = Step(BASE)
    params = step.init(jax.random.key(0))
    ids = jnp.arange(6)[None]
    output = run(step, params, ids, positions(1, 0, 6), taps=(0, 1))
    embedded = run(step, params, params["embedding"][ids], positions(1, 0, 6))
    assert [tap.shape for tap in output.taps] == [(1, 6, 32)] * 2
    np.testing.assert_allclose(output.hidden, embedded.hidden, atol=1e-6)


def test_bidirectional_mask_sees_ahead():
    step = Step(BASE)
    params = step.init(jax.random.key(0))
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
    params = step.init(jax.random.key(0))
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
