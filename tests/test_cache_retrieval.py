"""The retrieval cache: what it keeps of a prompt, and that it is exact where it keeps all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import cache as kv
from jaxinfer import ops
from jaxinfer.cache.retrieval import Asking, Retrieval
from jaxinfer.errors import ConfigError
from tests import cache_laws as laws

B, H, G, D, C, CHUNK = 3, 4, 2, 8, 40, 4
LENGTHS = np.array([37, 5, 0])
LAYERS = {
    "rope": dataclasses.replace(laws.PLAIN, position=ops.Rope(D)),
    "alibi": dataclasses.replace(laws.PLAIN, position=ops.Alibi(H)),
    "window": dataclasses.replace(laws.PLAIN, position=ops.Rope(D), window=9),
}


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    shapes = {"k": (B, G, C, D), "v": (B, G, C, D), "q": (B, H, 1, D), "k2": (B, G, 3, D), "v2": (B, G, 3, D)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()} | {
        "q2": jnp.asarray(rng.normal(size=(B, H, 3, D)), jnp.float32)
    }


def filled(layer, x):
    """A dense cache of ragged rows."""
    spec = kv.Dense(layer, C + 8)
    at = np.where(np.arange(C) < LENGTHS[:, None], np.arange(C), -1)
    block = kv.write_block(spec.new_block(B, C), x["k"], x["v"], jnp.asarray(at), 0)
    path = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32), (B, C))
    return spec, spec.commit(spec.init(B), block, path, jnp.asarray(LENGTHS, jnp.int32))


def retrieved(spec, layer, x):
    dense, state = filled(layer, x)
    at = jnp.asarray(LENGTHS[:, None], jnp.int32)
    return spec.of(dense.dense_view(state, at), x["q"], at, state.t), dense, state


@pytest.mark.slow
def test_the_chunks_with_the_largest_products_are_kept_and_the_first():
    rng = np.random.default_rng(1)
    layer = LAYERS["rope"]
    x = {name: jnp.asarray(rng.normal(size=(B, n, size, D)), jnp.float32)
         for name, n, size in (("k", G, C), ("v", G, C), ("q", H, 1))}  # fmt: skip
    state, dense, _ = retrieved(Retrieval(layer, budget=3 * CHUNK + 1, chunk=CHUNK), layer, x)
    for row in range(B):
        p = np.full((1, 1), LENGTHS[row])
        q = np.asarray(layer.rotate(x["q"][row : row + 1], p))[0, :, 0].reshape(G, H // G, D).sum(1)
        k = np.asarray(layer.rotate(x["k"][row : row + 1], np.arange(C)[None]))[0]
        for group in range(G):
            starts = range(0, LENGTHS[row], CHUNK)
            chunks = [np.arange(start, min(start + CHUNK, LENGTHS[row])) for start in starts]
            order = sorted(range(1, len(chunks)), key=lambda c: -k[group, chunks[c]].mean(0) @ q[group])
            want = np.sort(np.concatenate([chunks[c] for c in [0, *order][:3]])) if chunks else []
            got = np.asarray(state.kept[row, group])
            assert np.sort(got[got >= 0]).tolist() == list(want)
            np.testing.assert_array_equal(state.v[row, group][got >= 0], x["v"][row, group][got[got >= 0]])
    assert state.kept.shape == (B, G, 3 * CHUNK) and state.t.tolist() == LENGTHS.tolist()
    assert dense is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_budget_of_the_whole_prompt_is_the_whole_cache(name, x):
    layer = LAYERS[name]
    spec = Retrieval(layer, budget=C, chunk=CHUNK, recent=8)
    own, dense, state = retrieved(spec, layer, x)
    at = jnp.asarray(LENGTHS[:, None] + np.arange(3), jnp.int32)
    for _ in range(2):  # before and after three tokens more
        got, want = (
            s.attend(st, kv.write_block(s.new_block(B, 3), x["k2"], x["v2"], at, 0), x["q2"], at, None)[0]
            for s, st in ((spec, own), (dense, state))
        )
        np.testing.assert_allclose(got.out, want.out, atol=1e-5)
        np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)
        path = jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (B, 3))
        block = kv.write_block(spec.new_block(B, 3), x["k2"], x["v2"], at, 0)
        own, state = (s.commit(st, block, path, jnp.full(B, 3)) for s, st in ((spec, own), (dense, state)))
        at = at + 3
    assert own.t.tolist() == (LENGTHS + 6).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_naive_attention_over_the_view(name, x):
    layer = LAYERS[name]
    spec = Retrieval(layer, budget=2 * CHUNK, chunk=CHUNK, recent=2)
    state, _, _ = retrieved(spec, layer, x)
    at = jnp.asarray(LENGTHS[:, None] + np.arange(3), jnp.int32)
    block = kv.write_block(spec.new_block(B, 3), x["k2"], x["v2"], at, 0)
    state = spec.commit(state, block, jnp.broadcast_to(jnp.arange(3, dtype=jnp.int32), (B, 3)), jnp.full(B, 3))
    view = spec.dense_view(state, at + 3)
    empty = spec.new_block(B, 3)
    part, _ = spec.attend(state, empty, x["q2"], at + 3, None)
    oracle = ops.attend_naive(layer, x["q2"], view.k, view.v, view.distance, view.visible)
    np.testing.assert_allclose(part.out, oracle.out, atol=2e-5)
    assert state.pos.shape == (B, G, 2 * CHUNK + 2)


@pytest.mark.slow
def test_asking_notes_the_queries_and_changes_nothing(x):
    layer = LAYERS["rope"]
    dense, state = filled(layer, x)
    at = jnp.asarray(LENGTHS[:, None], jnp.int32)
    asking = Asking(dense)
    part, notes = asking.attend(state, asking.new_block(B, 1), x["q"], at, None)
    want, _ = dense.attend(state, dense.new_block(B, 1), x["q"], at, None)
    jax.tree.map(np.testing.assert_array_equal, part, want)
    assert notes is x["q"] and asking.attention is layer


def test_settings_that_hold_nothing_are_refused():
    with pytest.raises(ConfigError, match="whole chunks: got budget 7 and chunk 8"):
        Retrieval(laws.PLAIN, budget=7)
    with pytest.raises(ConfigError, match="recent: got 0"):
        Retrieval(laws.PLAIN, recent=0)
    assert Retrieval(laws.PLAIN, budget=4099).slots == 4096
