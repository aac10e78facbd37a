"""The programme over step segments finds what trying every cut finds."""

import itertools

import numpy as np
import pytest

from jaxinfer.errors import InputError
from jaxinfer.flow.segment_dp import segment_dp

pytestmark = pytest.mark.smoke


def brute_force(cost, count, shortest, longest):
    n = len(cost) - 1
    best = np.inf
    for inner in itertools.combinations(range(1, n), count - 1):
        edges = (0, *inner, n)
        if all(shortest <= b - a <= longest for a, b in itertools.pairwise(edges)):
            best = min(best, sum(cost[a, b] for a, b in itertools.pairwise(edges)))
    return best


def mismatches(solver, tables=60):
    wrong = 0
    rng = np.random.default_rng(0)
    for _ in range(tables):
        n = int(rng.integers(3, 9))
        shortest, longest = int(rng.integers(1, 3)), int(rng.integers(3, n + 1))
        cost = rng.exponential(size=(n + 1, n + 1))
        found = solver(cost, n, shortest=shortest, longest=longest)
        for count in range(1, n + 1):
            value = found.values[count - 1]
            wrong += not np.isclose(value, brute_force(cost, count, shortest, longest), rtol=1e-12)
            if np.isfinite(value):
                edges = found.edges(count)
                wrong += edges[0] != 0 or edges[-1] != n or len(edges) != count + 1
                lengths = np.diff(edges)
                wrong += lengths.min() < shortest or lengths.max() > longest
                wrong += not np.isclose(sum(cost[a, b] for a, b in itertools.pairwise(edges)), value, rtol=1e-12)
    return wrong


def test_equals_brute_force_with_limits():
    assert mismatches(segment_dp) == 0


def test_a_greedy_cut_is_caught():
    """Negative control: the limits forgotten, and one segment split where it costs least."""
    assert mismatches(lambda cost, most, **_: segment_dp(cost, most)) > 0

    def greedy(cost, most, *, shortest, longest):
        found = segment_dp(cost, most, shortest=shortest, longest=longest)
        values = found.values.copy()
        values[1:] = [min(v, cost[0, 1] + cost[1:, -1].min()) for v in values[1:]]
        return type(found)(values, found.following)

    assert mismatches(greedy) > 0


def test_bad_input():
    cost = np.ones((5, 5))
    with pytest.raises(InputError, match="most: got 5 segments, accepts 1 to the number of steps, 4"):
        segment_dp(cost, 5)
    with pytest.raises(InputError, match=r"shape \(5, 4\)"):
        segment_dp(cost[:, :4], 2)
    with pytest.raises(InputError, match=r"entry \(0, 3\) is nan"):
        segment_dp(np.where(np.arange(25).reshape(5, 5) == 3, np.nan, cost), 2)
    with pytest.raises(InputError, match="1 <= shortest <= longest"):
        segment_dp(cost, 2, shortest=3, longest=2)
    with pytest.raises(InputError, match="segments: got 3, accepts 1 to 2"):
        segment_dp(cost, 2).edges(3)
    with pytest.raises(InputError, match="4 steps cannot be cut into 1 segments"):
        segment_dp(cost, 2, longest=2).edges(1)
