"""BOSS: the best K times to step at for every K at once, found by dynamic programming, and a flow straightened to them.

A trained velocity is followed once on a fine uniform grid. What one long Euler step from t_i would miss of the fine
solution at t_j is a table; the cheapest path through it in K steps is the grid (`error_table`, `grids`). Then the model
is fine-tuned at those K times alone on the mean velocity to the next one, from its own trajectories, without data
(`distillation_pairs`, `Straighten`). Nguyen, Nguyen, Nguyen (2023), "Bellman Optimal Stepsize Straightening of
Flow-Matching Models", arXiv 2312.16414 (ICLR 2024).

Guarantee: the grid is the exact minimum of the sum of LOCAL squared errors over the subsets of the fine grid (not of
the error at the end, nor of a distance in law); the straightened model is a different one. State: none.

Paper's defaults: 100 fine steps, 100 samples for the table, 5,000 for straightening, 12,000 updates of batch 15, plain
L2, one model for each K. Departures: one pass can make the pairs of several K, for one model (a compromise: from the
same time, their velocities differ); arguments of minima are stored, where the code finds paths again by comparing
floats.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.errors import InputError
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.segment_dp import segment_dp
from jaxinfer.flow.types import Apply, VelocityFn, bcast, per_example


def fine_solution(velocity: VelocityFn, x0: jax.Array, ts: jax.Array, carry: Any = None):
    """Euler on the fine grid `ts f32[n+1]`: the states [n+1, B, ...] and the velocities at the first n of them."""
    ts = jnp.asarray(ts, jnp.float32)

    def step(state, interval):
        x, carry = state
        t, s = (jnp.full(x.shape[:1], u) for u in interval)
        v, carry = velocity(x, t, carry)
        after = (x + bcast(s - t, x) * v).astype(x.dtype)
        return (after, carry), (after, v)

    _, (states, velocities) = jax.lax.scan(step, (x0, carry), (ts[:-1], ts[1:]))
    return jnp.concatenate([x0[None], states]), velocities


def error_table(velocity: VelocityFn, x0: jax.Array, ts: Any, carry: Any = None) -> np.ndarray:
    """What one Euler step from t_i to t_j > i misses, f64[n+1, n+1]: the mean over `x0[B, ...]` of the squared distance
    to the fine solution, summed over a sample's numbers; infinite where j <= i.

    ts: the fine grid, f32[n+1]. Raises InputError for a grid that does not increase, or a velocity that is not finite.
    """
    check_grid(ts)
    grid = jnp.asarray(ts, jnp.float32)

    @jax.jit
    def table(x0, carry):
        states, velocities = fine_solution(velocity, x0, grid, carry)

        def row(i):
            reached = states[i] + (grid - grid[i]).reshape((-1,) + (1,) * x0.ndim) * velocities[i]
            return jnp.square((reached - states).astype(jnp.float32)).reshape(*states.shape[:2], -1).sum(-1).mean(1)

        return jax.lax.map(row, jnp.arange(len(grid) - 1))

    found = np.asarray(table(x0, carry), np.float64)
    if not np.isfinite(found).all():
        raise InputError(
            f"velocity: not finite on the fine grid of {len(grid) - 1} steps, first from step {_bad(found)}"
        )
    whole = np.full((len(grid), len(grid)), np.inf)
    above = np.triu_indices(len(grid), 1)
    whole[above] = found[above]
    return whole


def _bad(table: np.ndarray) -> int:
    return int(np.argwhere(~np.isfinite(table))[0, 0])


def grids(table: np.ndarray, ts: Any, most: int) -> dict[int, np.ndarray]:
    """The best grid of K steps, f32[K+1] of the fine grid's times, for each K from 1 to `most`."""
    check_grid(ts)
    if len(ts) != len(table):
        raise InputError(f"table: for {len(table)} times, the fine grid has {len(ts)}")
    best = segment_dp(table, most)
    return {k: np.asarray(ts, np.float32)[best.edges(k)] for k in range(1, most + 1)}


@struct.dataclass
class Pairs:
    """What straightening trains on, M rows: x[M, ...] at t f32[M] of a chosen grid, the mean velocity[M, ...] from
    there to the grid's next time s f32[M]; `cond`, which leads with M, is what it was made under."""

    x: jax.Array
    velocity: jax.Array
    t: jax.Array
    s: jax.Array
    cond: Any = None


def distillation_pairs(
    velocity: VelocityFn, x0: jax.Array, ts: Any, chosen: Sequence[Any], cond: Any = None, carry: Any = None
) -> Pairs:
    """The pairs of every step of every grid in `chosen`, from one fine solution of `x0[B, ...]` over `ts f32[n+1]`:
    B times the number of steps rows. InputError for a chosen time that is not one of the fine grid's.
    """
    check_grid(ts)
    fine, starts, ends = np.asarray(ts, np.float32), [], []
    for grid in chosen:
        check_grid(grid)
        at = np.searchsorted(fine, np.asarray(grid, np.float32))
        if (at >= len(fine)).any() or (fine[np.minimum(at, len(fine) - 1)] != np.asarray(grid, np.float32)).any():
            raise InputError(f"chosen: grid {np.asarray(grid).tolist()} has times that are not of the fine grid's")
        starts, ends = starts + list(at[:-1]), ends + list(at[1:])
    states, _ = fine_solution(velocity, x0, jnp.asarray(fine), carry)
    times, rows = jnp.asarray(fine), len(starts) * x0.shape[0]
    i, j = jnp.asarray(starts), jnp.asarray(ends)
    wide = (-1,) + (1,) * x0.ndim
    mean = (states[j] - states[i]) / (times[j] - times[i]).reshape(wide)
    flat = lambda x: x.reshape(rows, *x0.shape[1:])  # noqa: E731
    t, s = (jnp.repeat(times[k], x0.shape[0]) for k in (i, j))
    repeated = jax.tree.map(lambda c: jnp.tile(c, (len(starts),) + (1,) * (c.ndim - 1)), cond)
    return Pairs(flat(states[i]), flat(mean), t, s, repeated)


@dataclasses.dataclass(frozen=True)
class Straighten:
    """The objective `(apply, params, key, pairs) -> (loss, metrics)`: squared error of the instantaneous velocity at a
    grid's time to the mean velocity to its next one. `pairs`: a batch of rows of `Pairs`."""

    def __call__(self, apply: Apply, params: Any, key: jax.Array, pairs: Pairs) -> tuple[jax.Array, dict]:
        v = apply(params, pairs.x, pairs.t, pairs.t, pairs.cond).v
        loss = per_example(jnp.square(v - pairs.velocity)).mean()
        return loss, {}
