"""BOSS: the table of local errors, the best grids of it, and straightening on them; with closed-form flows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfer.errors import InputError
from jaxinfer.flow import bellman, schedule, solve
from jaxinfer.flow.types import Out

N = 12
FINE = schedule.uniform(N)
X0 = jax.random.normal(jax.random.key(0), (16, 3))


def curved(x, t, carry):
    """A field whose paths bend most near t = 1; it also stretches."""
    turn = 3.0 * t[:, None] ** 3
    return jnp.stack([-x[:, 1], x[:, 0], 0.5 * x[:, 2]], 1) * turn, carry


@pytest.fixture(scope="module")
def table():
    return bellman.error_table(curved, X0, FINE)


def local_error(x0, grid):
    """The sum of local errors of a grid, by walking the fine solution in numpy."""
    states, at = [np.asarray(x0)], [float(t) for t in FINE]
    velocity = lambda x, t: np.asarray(curved(jnp.asarray(x), jnp.full(len(x), t), None)[0])  # noqa: E731
    for t, s in itertools.pairwise(at):
        states.append(states[-1] + (s - t) * velocity(states[-1], t))
    total = 0.0
    for t, s in itertools.pairwise(grid):
        i, j = (int(np.argmin(np.abs(np.asarray(at) - u))) for u in (t, s))
        total += ((states[i] + (at[j] - at[i]) * velocity(states[i], at[i]) - states[j]) ** 2).sum(-1).mean()
    return total


def best_by_force(x0, k):
    inner = itertools.combinations(range(1, N), k - 1)
    return min(((local_error(x0, FINE[[0, *c, N]]), c) for c in inner), key=lambda pair: pair[0])


@pytest.mark.smoke
def test_grids_are_the_best_of_all(table):
    found = bellman.grids(table, FINE, N)
    for k in (1, 2, 3):
        least, _ = best_by_force(X0, k)
        assert local_error(X0, found[k]) == pytest.approx(least, rel=1e-4)
    uniform = [local_error(X0, schedule.uniform(k)) for k in (2, 3, 4)]
    assert all(local_error(X0, found[k]) < 0.9 * u for k, u in zip((2, 3, 4), uniform, strict=True))
    np.testing.assert_array_equal(found[N], FINE)
    assert found[2][1] > 0.5  # the paths bend late, so the second step is the short one


def test_a_wrong_table_is_caught(table):
    """Negative control: a table read the wrong way round in time gives grids that are not the best."""
    wrong = np.full_like(table, np.inf)
    above = np.triu_indices(N + 1, 1)
    wrong[above] = table[::-1, ::-1].T[above]
    found = bellman.grids(wrong, FINE, 3)
    assert local_error(X0, found[2]) > 1.2 * best_by_force(X0, 2)[0]


def test_one_step_is_free_on_a_straight_flow():
    straight = bellman.error_table(lambda x, t, carry: (jnp.ones_like(x), carry), X0, FINE)
    assert straight[np.triu_indices(N + 1, 1)].max() < 1e-9
    assert np.isinf(straight[np.tril_indices(N + 1)]).all()


def test_straightening_makes_the_chosen_grid_exact():
    """A model that can take any value at each time of the grid reaches the fine solution in K steps; the same number of
    uniform steps of the field itself does not."""
    table = bellman.error_table(curved, X0, FINE)
    grid = bellman.grids(table, FINE, 3)[3]
    pairs = bellman.distillation_pairs(curved, X0, FINE, [grid])
    assert pairs.x.shape == (48, 3) and pairs.t.shape == (48,)

    def apply(params, x, t, s, cond, *, seg=None, features=None):
        k = jnp.argmin(jnp.abs(t[:, None] - jnp.asarray(grid[:-1])), 1)
        return Out(jnp.einsum("bij,bj->bi", params[k], x), {})

    # The flow is linear in x and does not depend on the sample, so a matrix at each time is enough.
    params, optimizer = jnp.zeros((3, 3, 3)), optax.adam(0.03)
    objective = bellman.Straighten()

    @jax.jit
    def update(params, state):
        grads, _ = jax.grad(lambda p: objective(apply, p, jax.random.key(0), pairs), has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(500):
        params, state = update(params, state)
    fine, _ = bellman.fine_solution(curved, X0, FINE)
    student = solve.euler(lambda x, t, carry: (apply(params, x, t, t, None).v, carry), X0, grid).x
    plain = solve.euler(curved, X0, schedule.uniform(3)).x
    miss = lambda x: float(jnp.abs(x - fine[-1]).max())  # noqa: E731
    assert miss(student) < 5e-3 < 0.2 < miss(plain)
    # The planted target: velocities at the start of a step instead of the mean over it leave Euler's own error.
    planted = pairs.replace(velocity=curved(pairs.x, pairs.t, None)[0])
    assert float(objective(apply, params, jax.random.key(0), planted)[0]) > 1e-2


def test_pairs_of_several_grids_carry_their_conditions():
    cond = jnp.arange(16)
    chosen = [FINE[[0, 4, N]], FINE[[0, 6, 9, N]]]
    pairs = bellman.distillation_pairs(curved, X0, FINE, chosen, cond=cond)
    assert pairs.x.shape == (5 * 16, 3)
    np.testing.assert_array_equal(pairs.cond, np.tile(np.arange(16), 5))
    states, _ = bellman.fine_solution(curved, X0, FINE)
    np.testing.assert_allclose(pairs.x[:16], states[0], rtol=1e-6)
    moved = pairs.x + (pairs.s - pairs.t)[:, None] * pairs.velocity
    np.testing.assert_allclose(moved[16:32], states[N], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moved[48:64], states[9], rtol=1e-5, atol=1e-5)


def test_bad_input(table):
    with pytest.raises(InputError, match="a grid must increase"):
        bellman.error_table(curved, X0, FINE[::-1])
    with pytest.raises(InputError, match="not finite on the fine grid of 12 steps"):
        bellman.error_table(lambda x, t, carry: (x / (t[:, None] - FINE[3]), carry), X0, FINE)
    with pytest.raises(InputError, match="table: for 13 times, the fine grid has 12"):
        bellman.grids(table, FINE[:-1], 3)
    with pytest.raises(InputError, match="times that are not of the fine grid's"):
        bellman.distillation_pairs(curved, X0, FINE, [[0.0, 0.3, 1.0]])
