"""Blockwise flow matching: one segment is flow matching, each block sees its rows, the approximation's limits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import blockwise, objective, schedule
from jaxinfer.flow.alignment import Aligned
from jaxinfer.flow.blockwise import AnySegment, Blockwise, FeatureResidual
from jaxinfer.flow.blockwise_network import BlockwiseNetwork
from jaxinfer.flow.guide import Guidance
from jaxinfer.flow.paths import linear
from jaxinfer.flow.solve import euler
from jaxinfer.flow.times import Stratified
from jaxinfer.flow.types import Batch, Condition
from jaxinfer.models.dit import DitConfig

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Toy:
    """Two tokens of one number: features that are linear in time, blocks that scale x; its calls are counted."""

    segments: int
    calls: dict = dataclasses.field(default_factory=dict, hash=False, compare=False)

    def _count(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1

    def features(self, params, x, t, cond):
        self._count("features")
        label = 0.0 if cond is None else cond.labels[:, None, None]
        return params["features"] * (1 + t[:, None, None] * jnp.ones((1, 2, 1))) + 0.1 * label

    def velocity(self, params, block, x, t, cond, h):
        return block * x + h[:, :, 0] + t[:, None]

    def residual(self, params, x, t, cond):
        self._count("residual")
        return jnp.broadcast_to(params["residual"], (x.shape[0], 2, 1))

    def project(self, params, h):
        return jnp.concatenate([h, params["project"] * jnp.ones_like(h)], -1)


def params(segments):
    blocks = jax.random.normal(jax.random.key(1), (segments,)) * 0.5
    return {"features": jnp.asarray(0.7), "blocks": blocks, "project": jnp.asarray(0.3), "residual": jnp.asarray(0.0)}


BATCH = Batch(jax.random.normal(KEY, (12, 2)), Condition(labels=jnp.arange(12) % 3))
X = jax.random.normal(jax.random.key(2), (6, 2))


@pytest.mark.smoke
def test_one_segment_is_flow_matching():
    """The same loss and gradient as flow matching of the same model, from the same key."""
    toy, weights = Toy(1), params(1)
    mine = Blockwise(path=linear(), align=0.0)
    plain = objective.FlowMatching(path=linear(), times=Stratified(1))

    @jax.jit
    def both(p):
        one = lambda p: mine(toy, p, KEY, BATCH)[0]  # noqa: E731
        other = lambda p: plain(AnySegment(toy), p, KEY, BATCH)[0]  # noqa: E731
        return [jax.value_and_grad(f)(p) for f in (one, other)]

    (loss, grads), (want, want_grads) = both(weights)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, want_grads)


def spread(toy, weights, rows=12):
    """Velocities of rows in turn over the segments: by block, and by evaluating every block."""
    times = Stratified(toy.segments)(KEY, rows)
    x, cond = BATCH.x1[:rows], BATCH.cond
    h = toy.features(weights, x, times.t, cond)
    every = AnySegment(toy)(weights, x, times.t, times.t, cond, seg=times.seg)
    return blockwise.training_velocity(toy, weights, x, times.t, cond, h), every.v, times


def test_each_block_has_its_rows(monkeypatch):
    toy, weights = Toy(4), params(4)
    mine, want, times = spread(toy, weights)
    np.testing.assert_allclose(mine, want, rtol=1e-6)
    by_time = AnySegment(toy)(weights, BATCH.x1, times.t, times.t, BATCH.cond)
    np.testing.assert_allclose(by_time.v, want, rtol=1e-6)
    # Negative control: rows dealt out in runs, not in turn, meet the wrong blocks.
    monkeypatch.setattr(
        blockwise, "by_segment", lambda tree, m: jax.tree.map(lambda x: x.reshape(m, -1, *x.shape[1:]), tree)
    )
    assert float(jnp.abs(spread(toy, weights)[0] - want).max()) > 0.1


def test_sampling_is_eulers_method_on_every_segment():
    toy, weights = Toy(3), params(3)
    cond = Condition(labels=jnp.arange(6) % 3)
    got = blockwise.sample(toy, weights, X, cond, steps=4, approximated=False).x
    velocity = lambda x, t, carry: (AnySegment(toy)(weights, x, t + 1e-6, t, cond).v, carry)  # noqa: E731
    np.testing.assert_allclose(got, euler(velocity, X, schedule.uniform(12)).x, rtol=1e-4, atol=1e-5)


def test_the_approximation_at_its_limits():
    """Features that move by what the residual says are met exactly; at one step a segment it is not used."""
    toy, weights = Toy(3), params(3)
    exact = blockwise.sample(toy, weights, X, None, steps=4, approximated=False).x
    right = {**weights, "residual": weights["features"] / 3}  # how far the features move over a third
    np.testing.assert_allclose(blockwise.sample(toy, right, X, None, steps=4).x, exact, rtol=1e-5, atol=1e-6)
    held = blockwise.sample(toy, weights, X, None, steps=4).x  # a residual of nothing: features are held
    assert float(jnp.abs(held - exact).max()) > 1e-2
    once = [blockwise.sample(toy, weights, X, None, steps=1, approximated=a).x for a in (True, False)]
    np.testing.assert_array_equal(*once)


def test_the_feature_network_runs_once_a_segment():
    toy = Toy(3, {})
    blockwise.sample(toy, params(3), X, None, steps=4)
    # The scan over segments is traced once, and so is the one over a segment's other steps.
    assert toy.calls == {"features": 1, "residual": 1}


def test_the_residual_is_learned_at_its_minimum():
    """The residual's objective is zero where features move as it says, and its gradient says which way elsewhere."""
    toy, weights = Toy(3), params(3)
    loss = jax.jit(lambda r: FeatureResidual()(toy, r, KEY, BATCH, weights)[0])
    assert float(loss(weights["features"] / 3)) < 1e-10
    assert float(loss(jnp.asarray(0.0))) > 1e-3
    assert float(jax.grad(loss)(jnp.asarray(0.0))) < 0
    frozen = {k: v for k, v in weights.items() if k != "residual"}
    assert float(FeatureResidual()(toy, jnp.asarray(0.2), KEY, BATCH, frozen)[0]) > 0


@pytest.mark.slow
def test_guidance():
    toy, weights = Toy(2), params(2)
    cond = Condition(labels=jnp.full(6, 2))

    def run(scale, c=cond):
        return blockwise.sample(toy, weights, X, c, steps=3, guidance=Guidance(scale), approximated=False).x

    # Velocities are linear in the label here, so guidance of 3 from the null (-1) at label 2 is label 8.
    np.testing.assert_allclose(run(3.0), run(1.0, Condition(labels=jnp.full(6, 8))), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(run(3.0) - run(1.0)).max()) > 0.1
    with pytest.raises(InputError, match="guidance of scale 3 needs a condition"):
        run(3.0, None)


@pytest.mark.slow
def test_alignment_pulls_features_to_the_encoders():
    toy, weights = Toy(3), params(3)
    targets = jnp.concatenate([jnp.ones((12, 2, 1)), 2 * jnp.ones((12, 2, 1))], -1)
    objective = Blockwise(align=0.5)
    loss = lambda p: objective(toy, p, KEY, Aligned(BATCH, targets))  # noqa: E731
    with_it, metrics = loss(weights)
    without = Blockwise(align=0.0)(toy, weights, KEY, BATCH)[0]
    assert float(with_it - without) == pytest.approx(0.5 * float(metrics["alignment"]), rel=1e-4)
    grad = jax.grad(lambda p: loss(p)[0])(weights)["project"]
    moved = loss({**weights, "project": weights["project"] - 0.1 * grad / jnp.abs(grad)})[1]
    assert float(moved["alignment"]) < float(metrics["alignment"])
    with pytest.raises(ConfigError, match="a batch of Aligned, got Batch"):
        objective(toy, weights, KEY, BATCH)


def test_bad_input():
    toy = Toy(5)
    with pytest.raises(InputError, match="12 rows cannot be split over 5 segments evenly"):
        Blockwise(align=0.0)(toy, params(5), KEY, BATCH)
    with pytest.raises(ConfigError, match="steps: got 0"):
        blockwise.sample(toy, params(5), X, None, steps=0)
    bare = {k: v for k, v in params(5).items() if k != "residual"}
    with pytest.raises(ConfigError, match="train FeatureResidual"):
        blockwise.sample(toy, bare, X, None)


@pytest.mark.slow
def test_the_network():
    """The transformer's parts: shapes, features that guide the blocks, a residual that begins at zero."""
    config = DitConfig(4, 4, 1, patch=2, hidden_size=16, num_layers=1, num_heads=2, classes=3)
    network = BlockwiseNetwork(config, segments=2, velocity_layers=1, semantic_size=5)
    rng = np.random.default_rng(0)
    fill = lambda w: jnp.asarray(rng.normal(0, 0.2, w.shape), jnp.float32)  # noqa: E731
    weights = jax.tree.map(fill, jax.eval_shape(network.init, KEY))
    x, cond = jax.random.normal(KEY, (4, 4, 4, 1)), Condition(labels=jnp.asarray([0, 1, 2, -1]))
    t = jnp.asarray([0.1, 0.6, 0.2, 0.9])

    @jax.jit
    def run(weights):
        h = network.features(weights, x, t, cond)
        v = [blockwise.training_velocity(network, weights, x, t, cond, f) for f in (h, 0 * h)]
        return h, v, network.project(weights, h), network.residual(weights, x, t, cond)

    h, v, projected, r = run(weights)
    assert h.shape == r.shape == (4, 4, 16) and projected.shape == (4, 4, 5)
    assert v[0].shape == x.shape and float(jnp.abs(v[0] - v[1]).max()) > 1e-3  # features guide the blocks
    # A new residual network says nothing: its gates are zero.
    gates = {
        "block_0": {**weights["residual"]["block_0"], "modulation": 0 * weights["residual"]["block_0"]["modulation"]}
    }
    gates["block_0"]["modulation_bias"] = 0 * gates["block_0"]["modulation_bias"]
    assert not jax.jit(network.residual)({**weights, "residual": gates}, x, t, cond).any()
    with pytest.raises(ConfigError, match="at least 1"):
        BlockwiseNetwork(config, segments=0)
    with pytest.raises(ConfigError, match="no condition tokens"):
        BlockwiseNetwork(dataclasses.replace(config, token_size=4))
