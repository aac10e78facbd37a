"""The cheapest way to cut a sequence of steps into segments, for every number of segments at once.

A table gives what a segment from edge i to edge j costs; the programme finds the edges 0 = i_0 < ... < i_K = n of least
total cost, with every segment's length within limits. Two methods cut a sampler's steps so: BOSS chooses the times of
K Euler steps (Nguyen, Nguyen, Nguyen 2023, 2312.16414), CacheQuant the steps at which a cache is filled again
(Liu, Li, Gu 2025, 2503.01323).

Guarantee: exact minimum of the sum (ties: the earliest edges). State: none. Host code in float64: O(K n^2) time.

Stability: internal.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxinfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Segments:
    """The minima for 1 to K segments: `values f64[K]`, infinite where the limits admit no cut; `following i64[K, n+1]`,
    the edge after i in the best cut of [i, n] into k + 1 segments."""

    values: np.ndarray
    following: np.ndarray

    def edges(self, count: int) -> np.ndarray:
        """The edges `i64[count + 1]`, from 0 to n, of the best cut into `count` segments.

        InputError for a count outside 1 to K, or one that the limits on the length do not admit.
        """
        most = len(self.values)
        if not 1 <= count <= most:
            raise InputError(f"segments: got {count}, accepts 1 to {most}")
        if not np.isfinite(self.values[count - 1]):
            n = self.following.shape[1] - 1
            raise InputError(
                f"{n} steps cannot be cut into {count} segments within the limits on their length and cost"
            )
        found = [0]
        for k in reversed(range(count)):
            found.append(int(self.following[k, found[-1]]))
        return np.asarray(found)


def segment_dp(cost: np.ndarray, most: int, *, shortest: int = 1, longest: int | None = None) -> Segments:
    """The best cuts into 1 to `most` segments of `shortest` to `longest` steps.

    cost: f[n+1, n+1], `cost[i, j]` of a segment from edge i to edge j > i; infinite forbids it; the rest is not read.
    Raises InputError for a table that is not square, costs that are NaN or -inf, `most` outside 1 to n, or limits that
    are not 1 <= shortest <= longest.
    """
    cost = np.array(cost, np.float64)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or len(cost) < 2:
        raise InputError(f"cost: got shape {cost.shape}, accepts [n+1, n+1] with n of 1 or more")
    n = len(cost) - 1
    longest = n if longest is None else longest
    if not 1 <= most <= n:
        raise InputError(f"most: got {most} segments, accepts 1 to the number of steps, {n}")
    if not 1 <= shortest <= longest:
        raise InputError(f"segment lengths: got {shortest} to {longest}, accepts 1 <= shortest <= longest")
    length = np.arange(n + 1)[None] - np.arange(n + 1)[:, None]
    cost[(length < shortest) | (length > longest)] = np.inf
    bad = np.argwhere(np.isnan(cost) | (cost == -np.inf))
    if len(bad):
        raise InputError(f"cost: entry {tuple(map(int, bad[0]))} is {cost[tuple(bad[0])]}, accepts numbers and inf")
    rest = np.where(np.arange(n + 1) == n, 0.0, np.inf)  # of [i, n] in no segments: only where nothing is left
    values, following = [], []
    for _ in range(most):
        total = cost + rest[None]
        following.append(total.argmin(1))
        rest = total.min(1)
        values.append(rest[0])
    return Segments(np.asarray(values), np.stack(following))
