"""FlowOpt: a sample's noise sought through the whole solve, without a gradient, for inversion and for editing.

With f the solve from noise to data, x <- x - eta (f(x) - y) takes the identity for its Jacobian: a solve an iteration,
no backpropagation. With f under the source's own condition it inverts y; with f under another condition it edits: each
iterate's f(x) is a usable image, and more iterations bring it nearer to y. Ronai, Kulikov, Michaeli (2025), "FlowOpt:
Fast Optimization Through Whole Flow Processes for Training-Free Editing", arXiv 2510.22010.

Guarantee: exact in the limit where it converges, which it does from near by, linearly, when every eigenvalue of
I - eta J is inside the unit circle; for a symmetric positive Jacobian J, 0 < eta < 2 / lambda_max, which `step_bound`
estimates by power iteration on forward products (one solve's worth each), `secant_bound` from solves alone. State: x.

Paper's defaults: 8 iterations for an edit, 30 for an inversion, steps that depend on the model (0.0025 to 0.01), begun
at the inversion of y by `implicit_inverse`, at a noise level below the highest (the grid's first time). Departures: the
step is a share of the estimated bound, a row at a time, so that a row's result does not depend on its neighbours.

Stability: experimental.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.types import VelocityFn, bcast

# Of the bound, for an edit. At half of it, where it converges fastest, eight iterations gave the image back as it was
# (scripts/bench_flow.py: none of 1,080 glyphs was of the new class any more).
EDIT_SHARE = 0.05

Flow = Callable[[jax.Array], jax.Array]
"""x[B, ...] at the first time of a grid -> the sample[B, ...] that it becomes; rows are independent."""


@struct.dataclass
class Found:
    """The noise x[B, ...] and its sample, f(x); the mean squared error to y of each iterate, the first one's start
    included, f32[iterations + 1, B]; where asked for, each iterate's sample, [iterations + 1, B, ...]."""

    x: jax.Array
    sample: jax.Array
    errors: jax.Array
    samples: jax.Array | None = None


def optimize(
    flow: Flow, y: jax.Array, start: jax.Array, step: jax.Array | float, iterations: int, *, keep_all: bool = False
) -> Found:
    """`iterations` updates of `start[B, ...]` so that flow(x) comes near to `y[B, ...]`, by iterations + 1 solves.

    step: eta, a number or f32[B]. Raises InputError where y and start differ in shape, ConfigError for a negative
    number of iterations.
    """
    if y.shape != start.shape:
        raise InputError(f"start: shape {start.shape}, accepts that of y, {y.shape}")
    if iterations < 0:
        raise ConfigError(f"iterations: got {iterations}, accepts 0 or more")
    eta = bcast(jnp.broadcast_to(jnp.asarray(step, jnp.float32), y.shape[:1]), y).astype(y.dtype)

    def error(sample):
        return jnp.square((sample - y).astype(jnp.float32)).reshape(y.shape[0], -1).mean(1)

    def update(state, _):
        x, sample = state
        x = x - eta * (sample - y)
        sample = flow(x)
        return (x, sample), (error(sample), sample if keep_all else None)

    first = flow(start)
    (x, sample), (errors, samples) = jax.lax.scan(update, (start, first), length=iterations)
    errors = jnp.concatenate([error(first)[None], errors])
    return Found(x, sample, errors, None if samples is None else jnp.concatenate([first[None], samples]))


def nearest(found: Found) -> jax.Array:
    """Each row's sample [B, ...] with the least error to y of all its iterates: no further than where it started, also
    where a step took it away. Of an `optimize` that kept all samples; InputError for one that did not."""
    if found.samples is None:
        raise InputError("found.samples: none were kept; ask `optimize` to keep_all")
    best = jnp.nan_to_num(found.errors, nan=jnp.inf).argmin(0)
    return jax.vmap(lambda samples, i: samples[i], in_axes=(1, 0))(found.samples, best)


def implicit_inverse(velocity: VelocityFn, y: jax.Array, ts: Any, carry: Any = None) -> jax.Array:
    """The noise[B, ...] at ts[0] that Euler's method over the grid `ts f32[K+1]` takes near to `y`: where to start.

    Each step back is first taken with the velocity where it begins, then again with the one found where that leads:
    a fixed-point iteration on the forward step, and 2 K evaluations. Raises InputError for a grid that does not
    increase.
    """
    check_grid(ts)
    grid = jnp.asarray(ts, jnp.float32)

    def back(state, interval):
        x, carry = state
        t, s = (jnp.full(x.shape[:1], u) for u in interval)
        width = bcast(s - t, x)
        v, carry = velocity(x, s, carry)
        v, carry = velocity((x - width * v).astype(x.dtype), t, carry)
        return ((x - width * v).astype(x.dtype), carry), None

    (x, _), _ = jax.lax.scan(back, (y, carry), (grid[:-1], grid[1:]), reverse=True)
    return x


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a * b).astype(jnp.float32).reshape(a.shape[0], -1).sum(1)


def step_bound(flow: Flow, x: jax.Array, key: jax.Array, iterations: int = 20) -> jax.Array:
    """The step that convergence around x[B, ...] needs to stay under, f32[B]: 2 <d, J d> / |J d|^2 for the direction d
    that J stretches most, 2 / lambda_max where J is symmetric. Not positive: no step converges.

    By power iteration, so from below the largest eigenvalue: a bound that is slightly too large for few iterations.
    Row i's first direction is of fold_in(key, i).
    """

    def push(d):
        return jax.jvp(flow, (x,), (d,))[1]

    def unit(d):
        return d / bcast(jnp.sqrt(jnp.maximum(_inner(d, d), 1e-30)), d).astype(d.dtype)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(x.shape[0]))
    first = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
    d = jax.lax.fori_loop(0, iterations, lambda _, d: unit(push(d)), unit(first))
    pushed = push(d)
    return 2 * _inner(d, pushed) / jnp.maximum(_inner(pushed, pushed), 1e-30)


def secant_bound(flow: Flow, x: jax.Array, others: jax.Array) -> jax.Array:
    """The least of 2 <dx, df> / |df|^2 over the pairs of x[B, ...] and `others[N, B, ...]`, f32[B], by N + 1 solves: a
    step under it brings each of those pairs nearer. Larger than `step_bound` unless a pair finds the worst direction.
    """
    at = flow(x)

    def bound(other):
        dx, df = other - x, flow(other) - at
        return 2 * _inner(dx, df) / jnp.maximum(_inner(df, df), 1e-30)

    return jax.lax.map(bound, others).min(0)


def safe_step(bound: jax.Array, share: float = 0.5) -> jax.Array:
    """`share` of the bound f32[B]; half of it is 1 / lambda_max. Raises ConfigError for a share outside (0, 1), or a
    bound that is not positive, naming the rows: no step converges there."""
    _check_share(share)
    bad = np.flatnonzero(~(np.asarray(bound) > 0))
    if len(bad):
        raise ConfigError(f"rows {bad.tolist()}: the flow turns directions round there, no step size converges")
    return share * bound


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ConfigError(f"share: got {share}, accepts above 0 and under 1")


def edit(
    velocity: VelocityFn,
    flow: Flow,
    y: jax.Array,
    ts: Any,
    key: jax.Array,
    *,
    iterations: int = 8,
    power: int = 20,
    share: float = EDIT_SHARE,
) -> tuple[jax.Array, jax.Array]:
    """`y[B, ...]`, inverted under its own condition's `velocity` over the grid `ts`, and refined under `flow`, the
    solve over the same grid with the other condition: the nearest iterate [B, ...], and the bounds f32[B].

    power: iterations that estimate the bound, of which each row's step is `share`, 1 at most. A row whose bound is not
    positive is not refined; let `safe_step` name it. Raises ConfigError for a share outside (0, 1).
    """
    _check_share(share)
    start = implicit_inverse(velocity, y, ts)
    bound = step_bound(flow, start, key, power)
    step = jnp.where(bound > 0, jnp.minimum(share * bound, 1.0), 0.0)
    return nearest(optimize(flow, y, start, step, iterations, keep_all=True)), bound
