"""FlowOpt on linear and curved flows: the step's bound, convergence within it, divergence beyond, editing between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import flowopt, schedule
from jaxinfer.flow.solve import euler

KEY = jax.random.key(0)
SPREAD = jnp.asarray([0.4, 0.9, 1.3, 2.0])
TS = schedule.uniform(12)


def velocity(mean):
    """The flow from N(0, 1) to N(mean, SPREAD^2) in each number: its Jacobian is diagonal and positive."""

    def field(x, t, carry):
        t = t[:, None]
        variance = (1 - t) ** 2 + (t * SPREAD) ** 2
        return mean + (t * SPREAD**2 - (1 - t)) / variance * (x - t * mean), carry

    return field


def flow(x, mean=0.3):
    return euler(velocity(mean), x, TS).x


X = jax.random.normal(KEY, (3, 4))
Y = jax.jit(flow)(X)
LARGEST = float(jnp.abs(jax.jit(jax.jacfwd(lambda x: flow(x[None])[0]))(X[0])).max())


@pytest.mark.smoke
def test_the_bound_is_two_over_the_largest_eigenvalue():
    bound = jax.jit(lambda x: flowopt.step_bound(flow, x, KEY, 40))(X)
    np.testing.assert_allclose(bound, 2 / LARGEST, rtol=1e-3)
    # A turn of the same length in a plane: |J d| is right and the direction is not, so the step must be shorter.
    turn = jnp.asarray([[0.5, -1.0], [1.0, 0.5]])
    found = jax.jit(lambda x: flowopt.step_bound(lambda x: x @ turn.T, x, KEY))(jnp.ones((1, 2)))
    assert float(found[0]) == pytest.approx(2 * 0.5 / 1.25, rel=1e-4)
    # Secants never find a worse direction than the worst.
    others = X + jax.random.normal(jax.random.key(1), (20, 3, 4))
    secant = jax.jit(lambda x, others: flowopt.secant_bound(flow, x, others))(X, others)
    assert (secant >= bound * 0.999).all() and (secant < 3 * bound).all()


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda step: flowopt.optimize(flow, Y, jnp.zeros_like(Y), step, 60))


def test_it_converges_within_the_bound_and_not_beyond(run):
    for share in (0.5, 0.9):
        found = run(share * 2 / LARGEST)
        assert float(found.errors[-1].max()) < 1e-6 * float(found.errors[0].max())
        np.testing.assert_allclose(found.x, X, atol=2e-2)
    # Linear: the slowest direction decays by |1 - eta lambda|.
    beyond = run(1.1 * 2 / LARGEST)
    assert float(beyond.errors[-1].min()) > 10 * float(beyond.errors[0].max())


def test_a_wrong_sign_is_caught(run):
    """Negative control: an update towards the residual instead of against it."""
    assert float(run(-0.5).errors[-1].min()) > 1e3


def test_the_nearest_iterate_is_kept_where_steps_lead_away():
    """One row's step is far too large: the start remains; the other two have the last of their falling errors."""
    steps = jnp.asarray([0.5, 3.0, 0.5])
    found = jax.jit(lambda s: flowopt.optimize(flow, Y, jnp.zeros_like(Y), s, 20, keep_all=True))(steps)
    assert found.errors[-1, 1] > found.errors[0, 1]
    best = flowopt.nearest(found)
    np.testing.assert_array_equal(best[1], found.samples[0, 1])
    np.testing.assert_array_equal(best[0], found.samples[-1, 0])
    with pytest.raises(InputError, match="keep_all"):
        flowopt.nearest(flowopt.optimize(flow, Y, jnp.zeros_like(Y), 0.5, 1))


def test_rows_do_not_depend_on_each_other(run):
    alone = jax.jit(lambda y: flowopt.optimize(flow, y, jnp.zeros_like(y), 0.5, 60))(Y[:1])
    np.testing.assert_allclose(alone.x, run(0.5).x[:1], rtol=1e-5, atol=1e-6)
    steps = run(jnp.asarray([0.0, 0.5, 0.0]))
    assert (steps.x[0] == 0).all() and (steps.x[1] != 0).any()


def test_the_start_is_nearer_than_one_step_back():
    """Redoing each step back with the velocity where it led brings the inverse nearer to that of the forward solve."""
    start = jax.jit(lambda y: flowopt.implicit_inverse(velocity(0.3), y, TS))(Y)
    plain = Y
    step = jax.jit(lambda x, t, s: x - (s - t) * velocity(0.3)(x, jnp.full(3, s), None)[0])
    for t, s in zip(TS[:-1][::-1], TS[1:][::-1], strict=True):
        plain = step(plain, t, s)
    assert float(jnp.abs(start - X).max()) < 0.5 * float(jnp.abs(plain - X).max())


def bound_of(flow, x):
    return flowopt.step_bound(flow, x, KEY)


def test_an_edit_is_its_parts_put_together_and_no_row_sees_another():
    """The start, the bound, the step and the nearest iterate; a row whose bound is not positive stays at its start."""

    def other(x):  # turns the last row's directions round
        return flow(x, mean=1.5) * jnp.where(x[:, :1] > 50.0, -1.0, 1.0)

    y = Y.at[2].add(200.0)
    run = jax.jit(lambda y: flowopt.edit(velocity(0.3), other, y, TS, KEY, iterations=5, share=0.3))
    sample, bound = run(y)
    start = flowopt.implicit_inverse(velocity(0.3), y, TS)
    assert (bound[:2] > 0).all() and bound[2] < 0
    step = jnp.where(bound > 0, 0.3 * bound, 0.0)
    by_hand = flowopt.nearest(flowopt.optimize(other, y, start, step, 5, keep_all=True))
    np.testing.assert_allclose(sample, by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sample[2], other(start)[2], rtol=1e-5)
    assert float(jnp.square(sample - y)[:2].mean()) < 0.8 * float(jnp.square(other(start) - y)[:2].mean())
    alone, its_bound = run(y[:1])
    np.testing.assert_allclose(alone, sample[:1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(its_bound, bound[:1], rtol=1e-5)
    with pytest.raises(ConfigError, match="share: got 0"):
        flowopt.edit(velocity(0.3), other, y, TS, KEY, share=0)


@pytest.mark.slow
def test_editing_moves_from_the_target_to_the_source():
    """Under another condition each iterate is a sample of that condition, ever nearer to the source image."""
    other = lambda x: flow(x, mean=1.5)  # noqa: E731
    start, bound = jax.jit(lambda y: (x := flowopt.implicit_inverse(velocity(0.3), y, TS), bound_of(other, x)))(Y)
    step = flowopt.safe_step(bound)
    edited = jax.jit(lambda y, x, step: flowopt.optimize(other, y, x, step, 6, keep_all=True))(Y, start, step)
    assert (jnp.diff(edited.errors, axis=0) < 0).all()
    np.testing.assert_allclose(edited.samples[-1], edited.sample)
    np.testing.assert_allclose(edited.samples[0], other(start), rtol=1e-5)
    np.testing.assert_allclose(edited.sample, other(edited.x), rtol=1e-5)


def test_bad_input():
    with pytest.raises(InputError, match=r"start: shape \(2, 4\), accepts that of y, \(3, 4\)"):
        flowopt.optimize(flow, Y, X[:2], 0.5, 1)
    with pytest.raises(ConfigError, match="iterations: got -1"):
        flowopt.optimize(flow, Y, X, 0.5, -1)
    with pytest.raises(InputError, match="a grid must increase"):
        flowopt.implicit_inverse(velocity(0.0), Y, TS[::-1])
    with pytest.raises(ConfigError, match="share: got 1.0"):
        flowopt.safe_step(jnp.ones(2), 1.0)
    with pytest.raises(ConfigError, match=r"rows \[1\]: .* no step size converges"):
        flowopt.safe_step(flowopt.step_bound(lambda x: x * jnp.asarray([[1.0], [-1.0]]), jnp.ones((2, 3)), KEY))
