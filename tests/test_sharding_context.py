"""Ring attention and expert parallelism: naive attention and the plain mixture, bit of work by bit of work."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer.cache.dense import Dense
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.models import ModelConfig
from jaxinfer.models.decoder import Experts
from jaxinfer.ops.attention import AttentionSpec, Bidirectional, Segments, attend_naive, block_visibility
from jaxinfer.ops.position import Alibi, Rope
from jaxinfer.sharding import experts, ring_attention
from jaxinfer.sharding.collectives import summary
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.ring_attention import ContextDense, Keys, work, zigzag
from jaxinfer.sharding.strategies import product

MESH = make_mesh({"context": 4, "tensor": 2})
RULES = product("context", "tensor")
SPEC = AttentionSpec(4, 2, 8, 8**-0.5, Rope(8))
ROWS, TOKENS = 2, 16


def arrays(seed=0):
    random = np.random.default_rng(seed)
    shape = lambda heads: (ROWS, heads, TOKENS, 8)  # noqa: E731
    q, k, v = (jnp.asarray(random.normal(size=shape(heads)), jnp.float32) for heads in (4, 2, 2))
    return q, k, v


def ringed(spec, q, k, v, positions, mask=None):
    at = jnp.maximum(positions, 0)
    ids = mask.ids if isinstance(mask, Segments) else jnp.zeros_like(positions)
    keys = [Keys(spec.rotate(k, at), v, positions, ids)]
    return ring_attention.ring_attention(spec, spec.rotate(q, at), keys, positions, mesh=MESH, rules=RULES, mask=mask)


def naive(spec, q, k, v, positions, mask=None):
    distance = (positions[:, :, None] - positions[:, None, :])[:, None]
    return attend_naive(spec, q, k, v, distance, block_visibility(spec, positions, positions, mask))


def outcome(attention, spec, positions, mask):
    """The output, lse, and the gradients of a loss that reads both (of rows that see something)."""
    seen = (positions >= 0)[:, None]
    taste = jnp.sin(jnp.arange(8.0))

    def loss(q, k, v):
        part = attention(spec, q, k, v, positions, mask)
        lse = jnp.where(seen, part.lse, 0.0)
        return (part.out * taste * seen[..., None]).sum() + jnp.sin(lse).sum(), (part.out * seen[..., None], lse)

    (_, found), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays())
    return found, gradients


def error(got, want):
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def causal():
    return jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (ROWS, TOKENS))


def zigzag_with_gaps():
    """Positions in zigzag order, with empty slots at the end of a row."""
    return jnp.where(jnp.arange(TOKENS) < jnp.array([[16], [11]]), causal(), -1)[:, zigzag(TOKENS, 4)]


def test_the_ring_is_naive_attention(monkeypatch):
    positions = zigzag_with_gaps()
    seen = (positions >= 0)[:, None, :, None]
    want = naive(SPEC, *arrays(), positions).out

    def found():
        return jnp.where(seen, jax.jit(lambda q, k, v: ringed(SPEC, q, k, v, positions).out)(*arrays()), 0.0)

    assert error(found(), jnp.where(seen, want, 0.0)) < 2e-5
    # Planted bug: what arrives is always one's own.
    monkeypatch.setattr(ring_attention._Static, "ring", property(lambda s: [(i, i) for i in range(s.parts)]))
    assert error(found(), jnp.where(seen, want, 0.0)) > 1e-2


@pytest.mark.slow
def test_gradients_go_round_the_ring(monkeypatch):
    want = outcome(naive, SPEC, zigzag_with_gaps(), None)
    assert error(outcome(ringed, SPEC, zigzag_with_gaps(), None), want) < 2e-5
    # Planted bug: gradients of keys stay where the last hop left them.
    backward = ring_attention._backward

    def astray(static, saved, cotangent):
        *rest, keys = backward(static, saved, cotangent)
        moved = jax.lax.ppermute([(one.k, one.v) for one in keys], static.axis, static.ring)
        return *rest, [Keys(k, v, one.positions, one.ids) for (k, v), one in zip(moved, keys, strict=True)]

    own: Any = ring_attention._ring
    ring = jax.custom_vjp(own.fun, nondiff_argnums=(0,))
    ring.defvjp(ring_attention._forward, astray)
    monkeypatch.setattr(ring_attention, "_ring", ring)
    assert error(outcome(ringed, SPEC, zigzag_with_gaps(), None), want) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "softcap", "segments", "bidirectional", "no positions"])
def test_the_ring_under_every_mask(kind):
    changes = {"window": {"window": 5}, "softcap": {"softcap": 2.0}, "no positions": {"position": None}}
    spec = dataclasses.replace(SPEC, **changes.get(kind, {}))
    ids = jnp.asarray(causal() >= 7, jnp.int32)
    masks = {"segments": Segments(ids), "bidirectional": Bidirectional()}
    want = outcome(naive, spec, causal(), masks.get(kind))
    assert error(outcome(ringed, spec, causal(), masks.get(kind)), want) < 2e-5


def test_the_ring_moves_each_piece_once_a_hop_and_no_row_stands_whole():
    def run(q, k, v):
        return ringed(SPEC, q, k, v, causal()).out

    compiled = jax.jit(run).lower(*arrays()).compile()
    runs, moved = summary(compiled)["collective-permute"]
    # Keys, values, positions and ids of a quarter of the tokens, one of two key heads, three hops.
    assert moved == 3 * (2 * ROWS * 1 * 4 * 8 * 4 + 2 * ROWS * 4 * 4) and runs == 3 * 4
    assert f"f32[{ROWS},1,{TOKENS},8]" not in str(compiled.as_text())


def test_zigzag_halves_the_work_of_the_slowest_device():
    length, parts = 64, 4
    assert sorted(zigzag(length, parts)) == list(range(length))
    plain, balanced = work(np.arange(length), parts), work(zigzag(length, parts), parts)
    assert plain.sum() == balanced.sum()  # the same pairs, elsewhere
    assert plain.max(1).tolist() == [3, 4, 4, 4] and balanced.max(1).tolist() == [3, 2, 2, 2]
    assert balanced.min(1).tolist() == [3, 2, 2, 2]  # nobody waits
    assert work(np.arange(length), parts, window=8).sum() < plain.sum()
    with pytest.raises(InputError, match="accepted: a multiple of 8"):
        zigzag(12, 4)


def cache_steps(spec, chunks):
    """Attention of random queries, and commits, chunk by chunk: what a model does with a cache."""
    state, outs, t = spec.init(ROWS), [], 0
    q, k, v = arrays()
    for size in chunks:
        cut = slice(t, t + size)
        positions = causal()[:, cut]
        block = kv.Block(k[:, :, cut], v[:, :, cut], positions)
        outs.append(spec.attend(state, block, q[:, :, cut], positions, None)[0].out)
        path = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (ROWS, size))
        state = spec.commit(state, block, path, jnp.full(ROWS, size))
        t += size
    return jnp.concatenate(outs, 2), state


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 6])
def test_a_context_cache_is_a_dense_cache(window):
    """Prompt chunks go round the ring, single tokens are spread; slots end where the dense cache has them."""
    spec = dataclasses.replace(SPEC, window=window)
    chunks = (8, 1, 4, 1, 2)
    split = ContextDense(spec, 24, mesh=MESH, rules=RULES)
    got, state = jax.jit(lambda: cache_steps(split, chunks))()
    want, dense = jax.jit(lambda: cache_steps(Dense(spec, 24), chunks))()
    np.testing.assert_allclose(got, want, atol=2e-5)
    np.testing.assert_array_equal(state.pos, dense.pos)
    np.testing.assert_allclose(state.k, dense.k, atol=1e-5)
    assert state.k.addressable_shards[0].data.size * 8 == state.k.size


def test_what_the_ring_cannot_do_is_refused():
    q, k, v = arrays()
    with pytest.raises(ConfigError, match="got Alibi; accepted: rotary or no positions"):
        ringed(dataclasses.replace(SPEC, position=Alibi(4)), q, k, v, causal())
    with pytest.raises(InputError, match="got an array as mask; accepted: None, Bidirectional"):
        ringed(SPEC, q, k, v, causal(), jnp.ones((ROWS, TOKENS, TOKENS), bool))
    with pytest.raises(ConfigError, match="a context cache of 10 slots cannot be split"):
        ContextDense(SPEC, 10, mesh=MESH, rules=RULES)


CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_size=8, max_length=8,
    num_experts=8, experts_per_token=2, expert_size=12,
)  # fmt: skip


def mixture(split):
    """`Experts` of random weights whose router likes two experts of one device best, on 4 x 2 devices or on one: the
    function, and its arguments."""
    random = np.random.default_rng(0)
    weights = {
        name: jnp.asarray(random.normal(size=shape), jnp.float32)
        for name, shape in (("router", (8, 8)), ("gate", (8, 8, 12)), ("up", (8, 8, 12)), ("down", (8, 12, 8)))
    }
    # Three tokens in four go to experts 0 and 1: that device gets more rows than a round holds.
    x = jnp.asarray(random.normal(size=(8, 4, 8)), jnp.float32).at[:, 1:, 0].set(9.0)
    weights["router"] = weights["router"].at[0, :2].set(9.0)
    mesh, rules = make_mesh({"expert": 4, "tensor": 2}), product("expert", "tensor")

    def run(weights, x):
        module = Experts(CONFIG)
        if not split:
            return module.apply({"params": weights}, x)
        return module.apply({"params": weights}, x, method=lambda m, x: experts.apply(m, x, mesh, rules))

    return run, (weights, x)


def test_experts_get_every_token_however_uneven_the_routing(monkeypatch):
    assert experts.capacity_of(8, 2, 4) == 5 and experts.rounds_of(8, 2, 8, 4, 5) == 4
    plain, inputs = mixture(False)
    want: Any = jax.jit(plain)(*inputs)
    scale = float(jnp.abs(want).max())
    assert error(jax.jit(mixture(True)[0])(*inputs), want) < 1e-5 * scale
    # Planted bug: one round, as where what exceeds the capacity is dropped.
    monkeypatch.setattr(experts, "rounds_of", lambda *_: 1)
    assert error(jax.jit(mixture(True)[0])(*inputs), want) > 1e-2 * scale


@pytest.mark.slow
def test_gradients_go_to_the_experts_and_back():
    def outcome(split):
        run, inputs = mixture(split)

        def loss(weights, x):
            out: Any = run(weights, x)
            return (out * jnp.cos(jnp.arange(8.0))).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*inputs)

    want = outcome(False)
    assert error(outcome(True), want) < 1e-5 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))


def test_experts_refuse_rows_that_are_not_split_with_them():
    mesh, rules = make_mesh({"tensor": 4}), product("tensor").replace(experts="tensor", mlp=None)
    weights = jax.eval_shape(Experts(CONFIG).init, jax.random.key(0), jnp.ones((2, 2, 8)))
    with pytest.raises(ConfigError, match="experts are split over 'tensor', and rows over None; accepted: one axis"):
        Experts(CONFIG).apply(weights, jnp.ones((2, 2, 8)), method=lambda m, x: experts.apply(m, x, mesh, rules))
