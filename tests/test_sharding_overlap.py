"""Collective matmuls: ring steps give what a gather or scatter around a product gives, and nothing else is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer import decode
from jaxinfer.cache import SinkCache
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig, Step
from jaxinfer.sharding import overlap
from jaxinfer.sharding.collectives import collectives
from jaxinfer.sharding.overlap import OverlappedStep, all_gather_matmul, matmul_reduce_scatter
from jaxinfer.sharding.rules import TENSOR, shardings

DEVICES = 4
CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, mlp_size=48, max_length=32,
    windows=(4, None), tie_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True,
)  # fmt: skip


def mesh(**axes):
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=jax.devices()[:count])


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) * shape[0] ** -0.5 for key, shape in zip(keys, shapes, strict=True)]


def block(x, gate, up, down, *, bidirectional=False):
    """A gated MLP on tokens that are split over the axis, inside shard_map."""

    def columns(w):
        return all_gather_matmul(x, w, "tensor", dim=1, bidirectional=bidirectional)

    hidden = jax.nn.silu(columns(gate)) * columns(up)
    return matmul_reduce_scatter(hidden, down, "tensor", dim=1, bidirectional=bidirectional)


def sharded_block(bidirectional):
    tokens = P(None, "tensor")
    return jax.shard_map(
        lambda *a: block(*a, bidirectional=bidirectional),
        mesh=mesh(tensor=DEVICES),
        in_specs=(tokens, P(None, "tensor"), P(None, "tensor"), P("tensor")),
        out_specs=tokens,
        check_vma=False,
    )


def plain_block(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


@pytest.fixture(scope="module")
def operands():
    """Shards of three tokens, so that halves are of one and of two."""
    return arrays((2, 3 * DEVICES, 16), (16, 24), (16, 24), (24, 16))


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_mlp_block_and_its_gradients_are_right_and_permutes_only(operands, bidirectional):
    def loss(function):
        return lambda *a: (jnp.square(function(*a)).sum(), function(*a))

    run = jax.value_and_grad(loss(sharded_block(bidirectional)), argnums=(0, 1, 2, 3), has_aux=True)
    expected = jax.value_and_grad(loss(plain_block), argnums=(0, 1, 2, 3), has_aux=True)(*operands)
    program = compiled(run, *operands)
    for a, b in zip(jax.tree.leaves(program(*operands)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    whole = [one for one in collectives(program) if one.kind != "collective-permute"]
    assert [one.nbytes for one in whole] in ([], [4])  # at most the sum of the test's scalar loss


@pytest.mark.parametrize("bidirectional", [False, True])
def test_one_ring_a_product_and_the_bytes_of_a_gather_and_a_scatter(operands, bidirectional):
    """The block's two inputs share one gather, as a monolithic one would be; the rest is the formula of the ring."""
    m = mesh(tensor=DEVICES)
    tokens, columns, rows = P(None, "tensor"), P(None, "tensor"), P("tensor")
    specs = (tokens, columns, columns, rows)
    placed = [jax.device_put(x, NamedSharding(m, spec)) for x, spec in zip(operands, specs, strict=True)]
    found = collectives(compiled(sharded_block(bidirectional), *placed))
    assert {one.kind for one in found} == {"collective-permute"}
    shard = operands[0].nbytes // DEVICES
    assert sum(one.sent for one in found) == 2 * (DEVICES - 1) * shard
    assert sum(one.times for one in found) == 2 * (DEVICES - 1) * (1 + bidirectional)
    if bidirectional:
        assert max(one.nbytes for one in found) < shard


def test_a_ring_that_turns_the_wrong_way_is_caught(operands, monkeypatch):
    """Negative control: blocks put together in the other order."""
    gathered = overlap._gathered

    def wrong(x, product, axis, dim, way):
        return jnp.roll(gathered(x, product, axis, dim, way), 1, dim)

    monkeypatch.setattr(overlap, "_gathered", wrong)
    found = jax.jit(sharded_block(False))(*operands)
    assert float(jnp.abs(found - plain_block(*operands)).max()) > 0.1


@pytest.fixture(scope="module")
def decoder():
    step = Step(CONFIG)
    params = jax.tree.map(lambda w: w * 4 if w.ndim > 1 else w + 0.1, step.init(jax.random.key(0)))
    devices = mesh(data=2, tensor=2)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 48, (4, 8)), jnp.int32)
    return step, params, devices, ids, jax.device_put(params, shardings(step, devices, TENSOR))


def logits(step, params, ids):
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    return step.head(params, step(params, ids, positions)[0].hidden)


def test_a_decoder_of_collective_matmuls_is_the_same_decoder(decoder):
    """Logits, with a data axis beside the tensor axis; its program gathers and reduces nothing at once."""
    step, params, devices, ids, sharded = decoder
    rows = jax.device_put(ids, NamedSharding(devices, P("data")))
    program = compiled(lambda p, ids: logits(OverlappedStep(step, devices), p, ids), sharded, rows)
    expected = jax.jit(logits, static_argnums=0)(step, params, ids)
    np.testing.assert_allclose(program(sharded, rows), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    found = collectives(program)
    assert {one.kind for one in found} == {"collective-permute"}
    shard = 2 * 4 * CONFIG.hidden_size * 4  # rows and tokens of one device
    # Embedding and head, and per layer a gather and a scatter for each of attention and MLP.
    assert sum(one.sent for one in found) == (2 + 4 * CONFIG.num_layers) * (2 - 1) * shard


@pytest.mark.slow
def test_its_gradients_are_the_same(decoder):
    step, params, devices, ids, sharded = decoder

    def loss(step):
        return jax.grad(lambda p: jnp.square(logits(step, p, ids)).mean())

    program = compiled(loss(OverlappedStep(step, devices, bidirectional=True)), sharded)
    found, expected = program(sharded), jax.jit(loss(step))(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()), err_msg=str(path))
    # Norms and biases, which every device holds, are summed; no activation and no matrix is.
    whole = [one for one in collectives(program) if one.kind != "collective-permute"]
    assert {one.kind for one in whole} == {"all-reduce"}
    assert all(len(shape) == 1 for one in whole for shape in one.shapes)


@pytest.mark.slow
def test_it_decodes_token_for_token(decoder):
    """The decoding loop as for any step: a token a row is split over the rows."""
    step, params, devices, ids, sharded = decoder
    lengths, config = jnp.asarray([8, 3, 1, 5], jnp.int32), decode.Config(max_tokens=6)
    generate = jax.jit(decode.generate, static_argnames=("step", "config"))
    expected = generate(step, params, ids, lengths, config=config, key=jax.random.key(0))
    found = generate(OverlappedStep(step, devices), sharded, ids, lengths, config=config, key=jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


STEP = Step(CONFIG)
EXPLICIT = jax.sharding.AbstractMesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
ALIBI = Step(dataclasses.replace(CONFIG, position="alibi"))
SINKS = Step(dataclasses.replace(CONFIG, windows=()), cache=SinkCache(sinks=1, window=4))


def call(step, shape, dtype="int32", cache=None):
    return OverlappedStep(step, mesh(tensor=2))({}, jnp.zeros(shape, dtype), jnp.zeros(shape[:2], "int32"), cache)


@pytest.mark.parametrize(
    "make,error,words",
    [
        (lambda: OverlappedStep(STEP, mesh(model=2)), ConfigError, "axis 'tensor'"),
        (lambda: OverlappedStep(STEP, EXPLICIT), ConfigError, "AxisType.Auto"),
        (lambda: OverlappedStep(STEP, mesh(tensor=8)), ConfigError, r"num_heads 4 over 8 devices: \[1, 2, 4\]"),
        (lambda: OverlappedStep(ALIBI, mesh(tensor=2)), ConfigError, "rope"),
        (lambda: call(STEP, (3, 5)), InputError, "3 rows of 5 tokens: 2 devices"),
        (lambda: call(STEP, (2, 4, 32), "float32"), InputError, "not embeddings"),
        (lambda: call(SINKS, (2, 4), cache=SINKS.new_cache(2, 16)), ConfigError, "ring caches, got Sink"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
