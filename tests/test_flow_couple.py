"""Couplings: who is paired with whom, and what the pairs weigh; against exact and entropic transport."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow import couple, gibbs, optimal_transport
from jaxinfer.flow.types import Condition

KEY = jax.random.key(0)
COUPLINGS = {
    "independent": couple.independent,
    "pairs": couple.pairs,
    "assignment": optimal_transport.MinibatchOT(),
    "sinkhorn": optimal_transport.MinibatchOT("sinkhorn"),
    "gibbs": gibbs.Gibbs(2.0),
}


@pytest.fixture(scope="module")
def points():
    """A Gaussian and eight Gaussians on a circle, with the number of the component as the label."""
    rng = np.random.default_rng(0)
    n = 240
    x0 = rng.normal(size=(n, 2))
    labels = np.arange(n) % 8
    centres = 4 * np.stack([np.cos(np.pi * labels / 4), np.sin(np.pi * labels / 4)], 1)
    x1 = centres + 0.2 * rng.normal(size=(n, 2))
    return jnp.asarray(x0, jnp.float32), jnp.asarray(x1, jnp.float32), Condition(labels=jnp.asarray(labels))


def cost(x0, x1):
    return float(((x0 - x1) ** 2).sum(-1).mean())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "sinkhorn" else ()) for n in COUPLINGS]
)
def test_data_and_labels_are_not_moved(name, points):
    x0, x1, cond = points
    _, y1, given, log_w = COUPLINGS[name](KEY, x0, x1, cond)
    assert (y1 == x1).all() and (given.labels == cond.labels).all()
    assert log_w.shape == (len(x1),) and jnp.exp(log_w).mean() == pytest.approx(1, rel=1e-5)
    with pytest.raises(InputError, match="accepts one shape"):
        COUPLINGS[name](KEY, x0[:-1], x1, cond)


def test_assignment_is_the_least_of_all(points):
    x0, x1, _ = points
    y0, *_ = jax.jit(optimal_transport.MinibatchOT())(KEY, x0, x1, None)
    exact = ((np.asarray(x0)[:, None] - np.asarray(x1)[None]) ** 2).sum(-1)
    rows, columns = linear_sum_assignment(exact)
    assert cost(y0, x1) == pytest.approx(exact[rows, columns].mean(), rel=1e-5)
    assert sorted(map(tuple, np.asarray(y0).tolist())) == sorted(map(tuple, np.asarray(x0).tolist()))
    shuffled, *_ = couple.independent(KEY, x0, x1, None)
    assert cost(y0, x1) < 0.8 * cost(shuffled, x1)


@pytest.mark.slow
def test_the_entropic_plan_tends_to_the_assignment(points):
    x0, x1, _ = points
    y0, *_ = optimal_transport.MinibatchOT()(KEY, x0, x1, None)
    drawn, *_ = optimal_transport.MinibatchOT("sinkhorn", epsilon=0.02)(KEY, x0, x1, None)
    assert cost(drawn, x1) == pytest.approx(cost(y0, x1), rel=0.15)


def test_transport_within_classes(points):
    """Each class keeps a share of sources that does not depend on where the class lies; without, it does not."""
    x0, x1, cond = points
    offset = lambda y0: np.abs([np.asarray(y0)[np.asarray(cond.labels) == c].mean(0) for c in range(8)]).max()  # noqa: E731
    own = offset(x0)
    within, *_ = optimal_transport.MinibatchOT()(KEY, x0, x1, cond)
    anywhere, *_ = optimal_transport.MinibatchOT(across=0.0)(KEY, x0, x1, cond)
    assert offset(within) == pytest.approx(own, abs=1e-6)  # a permutation of the sources that came with the class
    assert offset(anywhere) > 2 * own
    assert cost(anywhere, x1) < cost(within, x1) < cost(x0, x1)
    between = optimal_transport.MinibatchOT(across=0.5)(KEY, x0, x1, cond)[0]
    assert cost(anywhere, x1) <= cost(between, x1) <= cost(within, x1)


def test_gibbs_weights_and_the_marginals(points):
    """Against exact entropic transport: the plan's Gibbs kernel misses its marginals by the tilt, and `tilt` sees it.

    The weights' mean cost goes below that of the plan, which obeys the marginals: cost alone would call that better.
    """
    x0, x1, _ = points
    distance = np.linalg.norm(np.asarray(x0)[:, None] - np.asarray(x1)[None], axis=-1)
    variances, distances = [], []
    for eps in (0.5, 1.0, 2.0, 4.0):
        kernel = np.exp(-distance / eps)
        plan, f, g = kernel / kernel.sum(), np.ones(len(x0)), np.ones(len(x1))
        for _ in range(1000):  # Sinkhorn
            f = 1 / (kernel @ g)
            g = 1 / (kernel.T @ f)
        exact = f[:, None] * kernel * g / len(x0)
        # Sinkhorn ends on the columns.
        assert np.abs(exact.sum(1) * len(x0) - 1).max() < 1e-3 and np.abs(exact.sum(0) * len(x0) - 1).max() < 1e-9
        source, data = gibbs.tilt(x0, x1, eps)
        np.testing.assert_allclose(source, plan.sum(1) * len(x0), rtol=2e-4)
        np.testing.assert_allclose(data, plan.sum(0) * len(x1), rtol=2e-4)
        variances.append(max(gibbs.tilt_variance(x0, x1, eps)))
        distances.append(np.abs(exact - plan).sum() / 2)
        if eps == 0.5:
            assert (plan * distance).sum() < 0.7 * (exact * distance).sum()
    assert variances == sorted(variances, reverse=True) and distances == sorted(distances, reverse=True)
    assert variances[0] > 0.5 and variances[-1] < 0.01 and distances[-1] < 0.05


def test_gibbs_weights_are_the_kernel(points):
    x0, x1, _ = points
    *_, log_w = gibbs.Gibbs(1.5)(KEY, x0, x1, None)
    kernel = np.exp(-np.linalg.norm(np.asarray(x0 - x1), axis=1) / 1.5)
    np.testing.assert_allclose(jnp.exp(log_w), kernel / kernel.mean(), rtol=1e-4)
    share = kernel.sum() ** 2 / (len(kernel) * (kernel**2).sum())
    assert float(gibbs.effective_share(log_w)) == pytest.approx(share, rel=1e-4)
    assert float(gibbs.effective_share(jnp.zeros(7))) == pytest.approx(1)
    # Negative control: the norm squared is another kernel.
    squared = np.exp(-(np.asarray(x0 - x1) ** 2).sum(1) / 1.5)
    assert np.abs(np.exp(log_w) - squared / squared.mean()).max() > 0.5


@pytest.mark.slow
def test_temperature_is_chosen_by_the_marginals(points):
    x0, x1, _ = points
    eps = gibbs.choose_temperature(x0, x1, (0.1, 0.3, 1.0, 3.0, 10.0))
    assert eps in {gibbs.temperature(kappa, x1) for kappa in (0.3, 1.0, 3.0)}
    assert max(gibbs.tilt_variance(x0, x1, eps)) <= 0.05
    with pytest.raises(ConfigError, match="kappas: none of .* try larger ones"):
        gibbs.choose_temperature(x0, x1, (0.05, 0.1))


def test_reflow_pairs_are_the_flows(points):
    x0, *_ = points
    from jaxinfer.flow.types import Solution

    solve = lambda velocity, x, ts, carry: Solution(x + (ts[-1] - ts[0]) * velocity(x, ts[:1], carry)[0])  # noqa: E731
    batch = couple.reflow(solve, lambda x, t, carry: (2 * x, carry), x0, jnp.asarray([0.0, 1.0]))
    y0, y1, _, log_w = couple.pairs(KEY, batch.x0, batch.x1, batch.cond)
    np.testing.assert_allclose(y1, 3 * x0, rtol=1e-6)
    assert (y0 == x0).all() and (log_w == 0).all()
    mixed, *_ = couple.independent(KEY, batch.x0, batch.x1, None)
    assert np.abs(np.asarray(y1 - 3 * mixed)).max() > 1  # shuffled, they are pairs no longer


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (gibbs.Gibbs, {"eps": 0.0}, "eps: got 0.0"),
        (optimal_transport.MinibatchOT, {"method": "auction"}, "method: got 'auction', accepts assignment, sinkhorn"),
        (optimal_transport.MinibatchOT, {"across": -1.0}, "across: got -1.0"),
        (optimal_transport.MinibatchOT, {"epsilon": 0.0}, "epsilon: got 0.0"),
    ],
    ids=["eps", "method", "across", "epsilon"],
)
def test_bad_settings(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
    assert dataclasses.is_dataclass(kind)
