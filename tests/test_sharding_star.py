"""The star all-reduce is the sum, in 2 (n - 1) messages and two steps, and its latency model is the paper's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.sharding import star
from jaxinfer.sharding.star import Links, fastest, seconds, star_all_reduce, star_wins_below

P = jax.sharding.PartitionSpec
PAPER = Links(hop=1.0, hops=4, bandwidth=1e30)  # seconds are then hops


def reduced(reduce, devices=4):
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    run = functools.partial(reduce, axis="tensor")
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("tensor"), out_specs=P("tensor"), check_vma=False))


def parts(devices=4):
    return jax.random.normal(jax.random.key(0), (devices, 5))


def test_it_is_the_sum_and_the_same_bits_everywhere():
    x = parts()
    found = np.asarray(reduced(star_all_reduce)(x))
    np.testing.assert_allclose(found, np.broadcast_to(x.sum(0), x.shape), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    x = parts(1)
    np.testing.assert_array_equal(reduced(star_all_reduce, 1)(x), x)


def test_its_gradient_is_that_of_psum():
    x, weight = parts(), jax.random.normal(jax.random.key(1), (4, 5))
    psum = reduced(lambda x, axis: jax.lax.psum(x, axis))
    found, expected = (
        jax.grad(lambda x, f=f: jnp.sum(weight * f(x) ** 2))(x) for f in (reduced(star_all_reduce), psum)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_program_sends_what_the_model_counts():
    text = reduced(star_all_reduce).lower(parts()).compile().as_text()
    assert text.count(" collective-permute(") + text.count(" collective-permute-start(") == 2 * (4 - 1)
    assert "all-reduce" not in text


def test_a_worker_left_out_is_seen(monkeypatch):
    """The planted bug: the sum of all but the last."""

    def wrong(x, axis):
        with monkeypatch.context() as patch:
            patch.setattr(star, "range", lambda a, b: list(range(a, b))[:-1] or [], raising=False)
            return star_all_reduce(x, axis)

    x = parts()
    assert np.abs(reduced(wrong)(x) - x.sum(0)).max() > 1e-2


def test_hops_of_the_paper():
    """8 devices, 4 hops apart: a star takes 8 hops, a tree of two levels 16, a ring 56."""
    assert seconds("star", 8, 1, PAPER) == pytest.approx(8)
    assert star.depth(8, 3) == 2
    assert seconds("tree", 8, 1, PAPER, fanout=3) == pytest.approx(16)
    assert seconds("ring", 8, 1, PAPER) == pytest.approx(56)
    assert fastest(8, 1, PAPER, fanout=3) == "star"


def test_bytes_of_a_message_decide_where_links_are_fast():
    fast = Links(hop=1e-6, hops=1, bandwidth=1e11)
    assert fastest(8, 16, fast) == "star"
    assert fastest(8, 2**28, fast) == "ring"
    assert seconds("ring", 1, 2**28, fast) == 0


@settings(deadline=None)
@given(st.integers(3, 64), st.floats(1e-7, 1e-2), st.integers(1, 8), st.floats(1e6, 1e12))
def test_the_crossing_is_where_the_two_times_are_equal(devices, hop, hops, bandwidth):
    links = Links(hop, hops, bandwidth)
    size = star_wins_below(devices, links)
    assert seconds("star", devices, size, links) == pytest.approx(seconds("ring", devices, size, links), rel=1e-9)
    assert seconds("star", devices, size / 2, links) < seconds("ring", devices, size / 2, links)
    assert seconds("star", devices, size * 2, links) > seconds("ring", devices, size * 2, links)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="accepts star, tree, ring"):
        seconds("snake", 4, 1, PAPER)
    with pytest.raises(ConfigError, match="bandwidth above 0"):
        Links(1.0, 1, 0.0)
    assert star_wins_below(2, PAPER) == 0
