"""Paths, times, grids, guidance and the flow-matching objective: their algebra, and what a wrong target does to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import guide, objective, paths, schedule, times
from jaxinfer.flow.types import Batch, Condition, Out, Times, drop, null, per_example

PATHS = {
    "linear": paths.linear(),
    "linear-sigma": paths.linear(1e-2),
    "cosine": paths.cosine(),
    "vp": paths.vp(),
    "custom": paths.custom(lambda t: t * t, lambda t: 1 - t**3),
}


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    x0, x1 = (jnp.asarray(rng.normal(size=(8, 3, 2)), jnp.float32) for _ in range(2))
    return x0, x1, jnp.linspace(0.05, 0.9, 8)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_derivative_and_gives_back_the_ends(name, points):
    path, (x0, x1, t) = PATHS[name], points
    x, v = paths.interpolate(path, x0, x1, t)
    _, slope = jax.jvp(lambda t: paths.interpolate(path, x0, x1, t)[0], (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(v, slope, atol=1e-4, rtol=1e-4)
    back0, back1 = paths.ends(path, x, v, t)
    np.testing.assert_allclose(back0, x0, atol=2e-3)
    np.testing.assert_allclose(back1, x1, atol=2e-3)
    np.testing.assert_allclose(paths.score(path, x, v, t) * path.b(t)[:, None, None], -x0, atol=2e-3)


def test_paths_refuse():
    with pytest.raises(ConfigError, match="sigma_min"):
        paths.linear(1.0)
    with pytest.raises(ConfigError, match=r"t = \[0, 1\]"):
        paths.custom(lambda t: t, lambda t: 1 + t)
    with pytest.raises(ConfigError, match="none of linear, cosine, vp"):
        paths.by_name("bent")
    with pytest.raises(InputError, match=r"\(2, 3\) and \(2, 4\)"):
        paths.interpolate(paths.linear(), jnp.zeros((2, 3)), jnp.zeros((2, 4)), jnp.zeros(2))
    assert paths.linear(1e-5) is paths.linear(1e-5)  # one object, one compilation


@pytest.mark.parametrize("name", schedule.SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedules_run_from_0_to_1(name, steps):
    ts = schedule.make(name, steps)
    schedule.check_grid(ts)
    assert ts.shape == (steps + 1,) and ts[0] == 0 and ts[-1] == 1


def test_schedules_known_values():
    np.testing.assert_allclose(schedule.shift(4, factor=1.0), schedule.uniform(4), atol=1e-7)
    assert schedule.shift(4)[1] < 0.25  # finer near the noise
    np.testing.assert_allclose(schedule.edm(2), [0, 1 / 1.002, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ([0.0, 0.5, 0.5, 1.0], "times 1 and 2 are 0.5 and 0.5"),
        ([1.0, 0.0], "must increase"),
        ([0.0, float("nan")], r"in \[0, 1\]"),
        ([0.0, 1.5], r"in \[0, 1\]"),
        ([0.0], "at least two"),
    ],
    ids=["repeat", "backward", "nan", "outside", "one"],
)
def test_grids_that_are_refused(grid, words):
    with pytest.raises(InputError, match=words):
        schedule.make(grid)
    with pytest.raises(InputError, match=words):
        times.Grid(tuple(grid))


DRAWS = {
    "uniform": times.Uniform(),
    "logit-normal": times.LogitNormal(0.5, 1.0),
    "mode": times.Mode(),
    "grid": times.Grid((0.0, 0.1, 0.6, 1.0)),
    "stratified": times.Stratified(4),
    "pair": times.Pair(0.75),
}


def draw(law, count):
    """Times as numpy, from one compiled program."""
    return Times(*map(np.asarray, jax.jit(law, static_argnums=1)(jax.random.key(1), count)))


@pytest.mark.parametrize("name", DRAWS)
def test_times_are_in_order(name):
    t, s, seg = draw(DRAWS[name], 4096)
    assert t.shape == s.shape == seg.shape == (4096,)
    assert t.dtype == s.dtype == np.float32 and seg.dtype == np.int32
    assert (t >= 0).all() and (s >= t).all() and (s <= 1).all()


def test_times_have_their_law():
    np.testing.assert_allclose(draw(times.Uniform(), 4096).t.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(np.median(draw(times.LogitNormal(0.5), 4096).t), 0.6225, atol=0.02)  # sigmoid(0.5)
    mode = draw(times.Mode(1.29), 4096).t
    middle, edge = np.mean(abs(mode - 0.5) < 0.1) / 0.2, np.mean((mode < 0.1) | (mode > 0.9)) / 0.2
    assert middle > 1.2 and 0.1 < edge < 1.0
    grid = draw(DRAWS["grid"], 4096)
    assert {(round(float(a), 3), round(float(b), 3)) for a, b in zip(grid.t, grid.s, strict=True)} == {
        (0.0, 0.1), (0.1, 0.6), (0.6, 1.0),
    }  # fmt: skip
    strata = draw(DRAWS["stratified"], 8)
    assert (np.floor(strata.t * 4) == strata.seg).all() and (np.bincount(strata.seg) == 2).all()
    pair = draw(DRAWS["pair"], 4096)
    np.testing.assert_allclose(np.mean(pair.t == pair.s), 0.75, atol=0.02)
    equal = pair.t == pair.s  # those rows have the law of `base`, not of a smaller of two
    np.testing.assert_allclose(np.median(pair.t[equal]), 0.5987, atol=0.03)  # sigmoid(0.4)


def test_null_and_drop():
    cond = Condition(labels=jnp.arange(6), tokens=jnp.ones((6, 2, 3)), image=jnp.ones((6, 4, 4, 1)))
    nothing = null(cond)
    assert (nothing.labels == -1).all() and not nothing.keep.any() and (nothing.image == 1).all()
    kept = drop(jax.random.key(0), cond, 0.5)
    gone = kept.labels == -1
    assert 0 < gone.sum() < 6 and (kept.keep == ~gone).all()
    assert (kept.labels[~gone] == jnp.arange(6)[~gone]).all()
    assert drop(jax.random.key(0), cond, 0.0) is cond and drop(jax.random.key(0), None, 0.5) is None


def linear_model(params, x, t, s, cond, *, seg=None, features=None):
    """v = w x + c[label], a model whose guided velocity is known."""
    labels = jnp.zeros(x.shape[0], jnp.int32) if cond is None else cond.labels
    return Out(params["w"] * x + params["c"][labels][:, None], {})


PARAMS = {"w": jnp.float32(0.3), "c": jnp.array([1.0, 2.0, -5.0])}  # label -1 is the last


def test_guidance():
    x, t = jnp.ones((2, 3)), jnp.full((2,), 0.5)
    cond = Condition(labels=jnp.array([0, 1]))
    plain, _ = guide.unguided(linear_model, PARAMS, cond)(x, t, None)
    one, _ = guide.guided(linear_model, PARAMS, cond, guide.Guidance(1.0))(x, t, None)
    assert (one == plain).all()
    strong, carry = guide.guided(linear_model, PARAMS, cond, guide.Guidance(2.0))(x, t, "carried")
    np.testing.assert_allclose(strong[:, 0], 0.3 + 2 * jnp.array([1.0, 2.0]) + 5.0, rtol=1e-6)
    assert carry == "carried"
    late = guide.guided(linear_model, PARAMS, cond, guide.Guidance(2.0, start=0.6))
    assert (late(x, t, None)[0] == plain).all() and (late(x, t + 0.2, None)[0] == strong).all()
    assert guide.baked(late) is late
    with pytest.raises(InputError, match="scale 2 needs a condition"):
        guide.guided(linear_model, PARAMS, None, guide.Guidance(2.0))
    with pytest.raises(ConfigError, match="interval"):
        guide.Guidance(2.0, 0.8, 0.2)


def exact_model(params, x, t, s, cond, *, seg=None, features=None):
    """The velocity of the linear path from a standard normal to a single point, which is all of the data."""
    return Out((params - x) / (1 - t)[:, None], {})


def test_objective_is_zero_at_the_exact_velocity():
    point = jnp.array([1.0, -2.0, 0.5])
    batch = Batch(jnp.tile(point, (64, 1)))
    fm = objective.FlowMatching(path=paths.linear(), times=times.LogitNormal())
    loss, metrics = jax.jit(fm, static_argnums=0)(exact_model, point, jax.random.key(0), batch)
    assert loss < 1e-8 and metrics["unweighted_loss"] == loss


@pytest.mark.parametrize("wrong", ["data", "sign", "times"])
def test_a_wrong_target_is_not_zero(wrong, monkeypatch):
    """Negative controls: targets of the right shape (the data, the velocity reversed, another row's time)."""
    right = paths.interpolate

    def planted(path, x0, x1, t):
        x, v = right(path, x0, x1, t)
        return {"data": (x, x1), "sign": (x, -v), "times": (right(path, x0, x1, t[::-1])[0], v)}[wrong]

    monkeypatch.setattr(objective, "interpolate", planted)
    point = jnp.array([1.0, -2.0, 0.5])
    fm = objective.FlowMatching(path=paths.linear(), times=times.LogitNormal())
    loss, _ = fm(exact_model, point, jax.random.key(0), Batch(jnp.tile(point, (64, 1))))
    assert loss > 0.1


def test_weights_couplings_and_pairs():
    losses, log_w = jnp.array([1.0, 3.0]), jnp.log(jnp.array([3.0, 1.0])) + 70
    np.testing.assert_allclose(objective.weighted_mean(losses, log_w), 1.5, rtol=1e-5)
    x0, x1 = jnp.zeros((2, 3)), jnp.ones((2, 3))
    t = Times(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, jnp.int32))
    still = lambda params, x, t, s, cond, *, seg=None, features=None: Out(jnp.zeros_like(x), {})  # noqa: E731
    np.testing.assert_allclose(objective.fm_losses(still, None, paths.linear(), t, x0, x1, None), [1, 1])
    couple = lambda key, x0, x1, cond: (x1, x1, cond, jnp.zeros(x1.shape[0]))  # noqa: E731
    fm = objective.FlowMatching(path=paths.linear(), couple=couple)
    assert fm(still, None, jax.random.key(0), Batch(x1, x0=x0))[0] == 0
    apart = dataclasses.replace(fm, couple=None)
    assert apart(still, None, jax.random.key(0), Batch(x1, x0=x0))[0] == 1
    np.testing.assert_allclose(per_example(jnp.arange(6.0).reshape(2, 3)), [1, 4])
