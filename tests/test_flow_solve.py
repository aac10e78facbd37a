"""Solvers on fields whose flow is known: Gaussian to Gaussian in closed form, order, inversion, likelihood."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import adaptive, schedule, solve

MEAN = np.array([1.0, -0.5], np.float32)
COVARIANCE = np.array([[2.0, 0.6], [0.6, 0.5]], np.float32)
VALUES, VECTORS = np.linalg.eigh(COVARIANCE)


def velocity(x, t, carry):
    """The optimal velocity of the linear path from N(0, I) to N(MEAN, COVARIANCE), independent pairs; the covariance's
    axes do not mix, and in one of variance l the gain is (t l - (1 - t)) / (t^2 l + (1 - t)^2)."""
    t = t[:, None]
    gain = (t * VALUES - (1 - t)) / (t**2 * VALUES + (1 - t) ** 2)
    return MEAN + ((x - t * MEAN) @ VECTORS * gain) @ VECTORS.T, None if carry is None else carry + 1


def flow_map(x0):
    """Where `velocity` carries x0 by t = 1: the symmetric root of the covariance, and the mean."""
    return MEAN + np.asarray(x0) @ VECTORS @ np.diag(np.sqrt(VALUES)) @ VECTORS.T


@pytest.fixture(scope="module")
def source():
    return jax.random.normal(jax.random.key(0), (64, 2))


@functools.partial(jax.jit, static_argnums=0)
def ends(solver, source, ts):
    """Where a solver takes the source by `velocity`, from one compiled program a number of steps."""
    return solver(velocity, source, ts).x


def error(solver, source, steps):
    return float(np.abs(ends(solver, source, schedule.uniform(steps)) - flow_map(source)).max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_order_of_convergence(name, order, source):
    solver = solve.by_name(name)
    coarse, fine = error(solver, source, 16), error(solver, source, 64)
    assert order - 0.35 < np.log2(coarse / fine) / 2 < order + 0.75  # midpoint does better than its order here
    assert fine < {1: 0.1, 2: 1e-3}[order]


def test_a_wrong_stage_loses_the_order(source):
    """Negative control: a midpoint step with its second stage at the start's time converges like Euler at best."""

    def wrong(velocity, x, t, s, carry):
        first, carry = velocity(x, t, carry)
        v, carry = velocity(x + 0.5 * (s - t)[:, None] * first, t, carry)
        return x + (s - t)[:, None] * v, carry

    broken = solve.FixedStep(wrong, 2)
    coarse, fine = error(broken, source, 16), error(broken, source, 64)
    assert np.log2(coarse / fine) / 2 < 1.4


def test_grid_carry_and_trajectory(source):
    grid = jnp.asarray(schedule.shift(5))
    found = jax.jit(lambda x, ts: solve.heun(velocity, x, ts, jnp.zeros(()), trajectory=True))(source, grid)
    assert found.trajectory.shape == (6, 64, 2) and found.carry == 2 * 5
    np.testing.assert_array_equal(found.trajectory[0], source)
    np.testing.assert_array_equal(found.trajectory[-1], found.x)
    by_hand = source
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        by_hand, _ = solve.heun_step(velocity, by_hand, jnp.full((64,), t), jnp.full((64,), s), None)
    np.testing.assert_allclose(found.x, by_hand, atol=1e-5)
    alone = ends(solve.heun, source[7:8], grid)  # a row alone is the row among others
    np.testing.assert_allclose(alone, found.x[7:8], rtol=1e-5)


def test_inverse_of_a_fine_grid(source):
    grid = schedule.uniform(100)
    there = ends(solve.midpoint, source, grid)
    back = jax.jit(lambda x: solve.inverse(solve.midpoint, velocity, x, grid).x)(there)
    np.testing.assert_allclose(back, source, atol=2e-3)
    assert np.abs(ends(solve.midpoint, there, grid) - source).max() > 0.5  # forward is not back


def test_refusals(source):
    with pytest.raises(InputError, match="must increase"):
        solve.euler(velocity, source, [1.0, 0.5, 0.0])
    with pytest.raises(InputError, match="must increase"):
        solve.inverse(solve.heun, velocity, source, [0.0, 0.0, 1.0])
    with pytest.raises(ConfigError, match="none of euler, heun, midpoint"):
        solve.by_name("rk9")
    with pytest.raises(InputError, match="two different times"):
        adaptive.dopri5(lambda cond: velocity, source, start=0.5, end=0.5)
    with pytest.raises(ConfigError, match="tolerances"):
        adaptive.Tolerance(rtol=0)


def test_missing_diffrax_names_the_extra(source, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffrax", None)
    with pytest.raises(ConfigError, match=r"jaxinfer\[flow\]"):
        adaptive.dopri5(lambda cond: velocity, source)


def scaled(cond):
    """A field that differs from row to row: dx/dt = cond x, so that steps differ too."""
    return lambda x, t, carry: (cond[:, None] * x, carry)


def test_dopri5(source):
    pytest.importorskip("diffrax")
    back = jax.jit(lambda x: adaptive.dopri5(lambda cond: velocity, x, start=1.0, end=0.0))(flow_map(source))
    np.testing.assert_allclose(back.x, source, atol=1e-3)
    assert back.ok.all() and (back.evaluations < 150).all()


@pytest.mark.slow
def test_dopri5_rows_have_their_own_steps():
    pytest.importorskip("diffrax")
    rates, x = jnp.array([0.1, 8.0]), jnp.ones((2, 1))
    both = adaptive.dopri5(scaled, x, rates)
    np.testing.assert_allclose(both.x[:, 0], jnp.exp(rates), rtol=1e-3)
    alone = adaptive.dopri5(scaled, x[:1], rates[:1])
    assert both.evaluations[0] == alone.evaluations[0] < both.evaluations[1] and both.x[0] == alone.x[0]
    few = adaptive.dopri5(scaled, x, rates, tolerance=adaptive.Tolerance(1e-7, 1e-7, max_steps=4))
    assert not few.ok[1]


def test_likelihood_of_a_gaussian(source):
    pytest.importorskip("diffrax")
    x = flow_map(source[:16])
    truth = multivariate_normal.logpdf(x, MEAN, COVARIANCE)
    found = adaptive.likelihood(lambda cond: velocity, x)
    np.testing.assert_allclose(found.log_p, truth, atol=2e-3)
    np.testing.assert_allclose(found.x0, source[:16], atol=1e-3)


@pytest.mark.slow
def test_hutchinson_is_unbiased(source):
    pytest.importorskip("diffrax")
    x = flow_map(source[:16])
    truth = multivariate_normal.logpdf(x, MEAN, COVARIANCE)
    guessed = adaptive.likelihood(lambda cond: velocity, x, key=jax.random.key(1), probes=64)
    assert 1e-4 < jnp.abs(guessed.log_p - truth).max() < 0.5  # unbiased, not exact
    np.testing.assert_allclose((guessed.log_p - truth).mean(), 0, atol=0.05)
    few = adaptive.likelihood(lambda cond: velocity, x[:3], key=jax.random.key(1), probes=64)
    np.testing.assert_allclose(few.log_p, guessed.log_p[:3], atol=1e-3)  # a row's signs are its own
