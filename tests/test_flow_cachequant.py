"""CacheQuant: the schedule against trying every one, corrections that are exact on lines, quantized weights."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import ops, quant
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import cachequant, schedule
from jaxinfer.flow.network import Network
from jaxinfer.flow.split_network import SplitNetwork
from jaxinfer.flow.types import Condition
from jaxinfer.models.dit import DitConfig

KEY = jax.random.key(0)
N, C = 8, 6
TS = schedule.uniform(N)
X = jax.random.normal(KEY, (16, 3))
COND = jax.random.normal(jax.random.key(1), (16, C))


@dataclasses.dataclass(frozen=True)
class Lines:
    """Deep features that are a line of the condition at each time, a different one for each channel."""

    bend: float = 0.0

    def deep(self, params, x, t, cond):
        rise = jnp.arange(1, C + 1) / C
        line = (1 + t[:, None] ** 2 * rise) * cond + 2 * t[:, None] * rise
        return line + self.bend * t[:, None] * jnp.sin(3 * x @ params["bend"])

    def shallow(self, params, x, t, cond, features):
        return ops.dot(jnp.tanh(features), params["out"]) - 0.5 * x


PARAMS = {
    "bend": jax.random.normal(jax.random.key(2), (3, C)),
    "out": jax.random.normal(jax.random.key(3), (C, 3)),
}


def miss(split, plan, params=PARAMS, x=X, cond=COND):
    """The largest distance between a plan's samples and those of the whole model."""
    run = lambda params, plan: cachequant.sample(split, params, x, cond, plan).x  # noqa: E731
    whole = cachequant.uncorrected(TS, tuple(range(N)), C, 3)
    return float(jax.jit(lambda p, plan: jnp.abs(run(p, plan) - run(PARAMS, whole)).max())(params, plan))


@pytest.mark.smoke
def test_correction_is_exact_on_lines():
    """On other samples than it was fitted on, too; without it, or with another step's line, it is not."""
    split, starts = Lines(), (0, 5)
    plan = cachequant.calibrate(split, PARAMS, X[:8], TS, COND[:8], starts)
    assert plan.deep_runs == 2
    assert miss(split, plan, x=X[8:], cond=COND[8:]) < 1e-4
    assert miss(split, cachequant.uncorrected(TS, starts, C, 3)) > 0.1
    shifted = cachequant.Line(*(jnp.roll(part, 1, 0) for part in (plan.features.scale, plan.features.offset)))
    assert miss(split, plan.replace(features=shifted)) > 0.1


@pytest.mark.slow
def test_correction_helps_where_it_is_not_exact():
    split, starts = Lines(bend=0.3), cachequant.evenly(N, 3)
    plan = cachequant.calibrate(split, PARAMS, X, TS, COND, starts)
    assert 1e-3 < miss(split, plan) < 0.5 * miss(split, cachequant.uncorrected(TS, starts, C, 3))
    every = cachequant.calibrate(split, PARAMS, X, TS, COND, tuple(range(N)))
    assert miss(split, every) < 1e-4


def test_what_a_line_leaves_is_the_unexplained_variance():
    x = jax.random.normal(KEY, (500, 2))
    y = jnp.stack([3 * x[:, 0] - 1 + 0.5 * x[:, 1] ** 2, 2 * x[:, 1] + 7], 1)
    scale, offset = cachequant.fit_line(x, y)
    left = (y - scale * x - offset).var(0)
    rho = [np.corrcoef(x[:, i], y[:, i])[0, 1] for i in range(2)]
    np.testing.assert_allclose(left, [(1 - r**2) * float(y[:, i].var()) for i, r in enumerate(rho)], atol=1e-4)
    scale, offset = cachequant.fit_line(jnp.full((10, 1), 3.0), jnp.arange(10.0)[:, None])
    assert (float(scale[0]), float(offset[0])) == (1.0, 1.5)  # nothing to learn a slope from


def best_by_force(cost, every):
    n = len(cost) - 1
    count = -(-n // every)
    cuts = itertools.combinations(range(1, n), count - 1)
    fits = lambda e: all(-(-every // 2) <= b - a <= 2 * every for a, b in itertools.pairwise(e))  # noqa: E731
    edges = [(0, *inner, n) for inner in cuts if fits((0, *inner, n))]
    return min(edges, key=lambda e: sum(cost[a, b] for a, b in itertools.pairwise(e)))[:-1]


def test_schedule_is_the_best_of_all():
    split = Lines(bend=0.3)
    cost = cachequant.distances(split, PARAMS, X, TS, COND)
    for every in range(1, N + 1):
        assert cachequant.schedule(cost, every) == best_by_force(cost, every)
    # The table is the distance from the kept features, summed over the steps that use them.
    t = lambda i: jnp.full(16, TS[i])  # noqa: E731
    still = Lines()
    cost = cachequant.distances(still, PARAMS, X, TS, COND)
    kept = [still.deep(PARAMS, X, t(i), COND) for i in range(N)]
    want = sum(float(jnp.abs(kept[i] - kept[2]).mean()) for i in (2, 3, 4))
    assert cost[2, 5] == pytest.approx(want, rel=1e-5) and np.isinf(cost[5, 2])
    # Features change faster and faster here, so late segments are shorter, which evenly spaced ones are not.
    lengths = np.diff([*cachequant.schedule(cost, 3), N])
    assert lengths[-1] < lengths[0]


@pytest.mark.slow
def test_quantized_weights_and_the_second_line():
    """The two errors are fitted one after the other: each line brings the sampler nearer to the full-precision one."""
    split, starts = Lines(), (0, 3, 6)
    coarse = quant.apply(PARAMS, [("out", quant.Int4(group=None, symmetric=True))])
    without = cachequant.uncorrected(TS, starts, C, 3)
    first = cachequant.calibrate(split, PARAMS, X, TS, COND, starts)
    both = cachequant.calibrate(split, PARAMS, X, TS, COND, starts, quantized=coarse)
    errors = [miss(split, plan, params=coarse) for plan in (without, first, both)]
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.97 * errors[1]
    np.testing.assert_allclose(both.features.scale, first.features.scale)
    # Weights that are all a little too small are put right exactly.
    small = {**PARAMS, "out": 0.9 * PARAMS["out"]}
    unmixed = dataclasses.make_dataclass("Unmixed", [], bases=(Lines,), frozen=True)
    unmixed.shallow = lambda self, params, x, t, cond, features: features @ params["out"]
    plan = cachequant.calibrate(unmixed(), PARAMS, X, TS, COND, starts, quantized=small)
    assert miss(unmixed(), plan, params=small) < 1e-4 < miss(unmixed(), plan.replace(velocity=without.velocity), small)


@pytest.mark.slow
def test_the_transformer_in_two_parts():
    """Run at every step it is the whole transformer; its params may be quantized."""
    config = DitConfig(4, 4, 1, patch=2, hidden_size=16, num_layers=3, num_heads=2, classes=3)
    network, split = Network(config), SplitNetwork(config, 1, 2)
    rng = np.random.default_rng(0)
    fill = lambda w: jnp.asarray(rng.normal(0, 0.2, w.shape), jnp.float32)  # noqa: E731
    weights = jax.tree.map(fill, jax.eval_shape(network.init, KEY))
    x, t, cond = jax.random.normal(KEY, (3, 4, 4, 1)), jnp.asarray([0.1, 0.5, 0.9]), Condition(labels=jnp.arange(3))
    rounded = quant.apply(weights, [(".*(qkv|up|down|o)", quant.Int8())])

    @jax.jit
    def run(weights, rounded):
        both = lambda w, scale=1.0: split.shallow(w, x, t, cond, scale * split.deep(w, x, t, cond))  # noqa: E731
        return network(weights, x, t, t, cond).v, both(weights), both(weights, 0.0), both(rounded)

    whole, parts, shallow, small = run(weights, rounded)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(shallow - whole).max()) > 1e-2
    assert 0 < float(jnp.abs(small - whole).max()) < 0.1 * float(jnp.abs(whole).max())
    with pytest.raises(ConfigError, match=r"got \[2, 4\), accepts a range within the model's 3"):
        SplitNetwork(config, 2, 4)


def test_bad_input():
    with pytest.raises(ConfigError, match="every: got 9, accepts 1 to the number of steps, 8"):
        cachequant.schedule(np.ones((N + 1, N + 1)), 9)
    for starts in ((), (1, 4), (0, 4, 4), (0, 8)):
        with pytest.raises(InputError, match="accepts 0 and then increasing steps under 8"):
            cachequant.uncorrected(TS, starts, C, 3)
    with pytest.raises(InputError, match="a grid must increase"):
        cachequant.distances(Lines(), PARAMS, X, TS[::-1], COND)
