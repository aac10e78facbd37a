"""CacheQuant: a sampler that keeps its deep features for a run of steps, on quantized weights, with both errors fitted.

Liu, Li, Gu (2025), "CacheQuant: Comprehensively Accelerated Diffusion Models", arXiv 2503.01323. The features of the
steps of a few calibration samples say which steps to run the deep layers at (`schedule`, by the programme over
segments); at the other steps the kept features are corrected, channel by channel, by the line that fits them to the
true ones best (`calibrate`). Quantized weights have a second line, from their output to that of the full-precision
ones, fitted after the first: the two errors are not fitted together. Nothing is trained.

Guarantee: approximate; exact where features change from step to step by a line per channel. State: the features of the
last full step. The weights' formats are those of `jaxinfer.quant`, put on by `quant.apply` as for any model.

Paper's defaults: 8 samples, L1 distances, ceil(T / N) segments of N / 2 to 2 N steps. Departures: the lines are fitted
along the sampler as it runs with the lines so far, so that they see the inputs that they will be used on; the second
line is that of the velocity's channels, not of every convolution.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.segment_dp import segment_dp
from jaxinfer.flow.types import Solution, bcast


class Split(Protocol):
    """A velocity model in two parts: what is kept, and what is run at every step. x[B, ...], t f32[B]."""

    def deep(self, params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        """Features[B, ..., C]."""
        ...

    def shallow(self, params: Any, x: jax.Array, t: jax.Array, cond: Any, features: jax.Array) -> jax.Array:
        """v like x."""
        ...


@struct.dataclass
class Line:
    """A line a step and channel, y = scale x + offset, f32[n, C] each."""

    scale: jax.Array
    offset: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x[..., C]` by the line of one step, f32[C] each."""
        return (self.scale * x + self.offset).astype(x.dtype)


@struct.dataclass
class Plan:
    """Where the deep layers run, `fresh bool[n]`, of the steps of the grid `ts f32[n+1]`; the line of the kept features
    at each step, and that of the velocity under quantized weights."""

    ts: jax.Array
    fresh: jax.Array
    features: Line
    velocity: Line

    @property
    def deep_runs(self) -> int:
        """How often the deep layers run for a sample; the shallow ones run at each of the n steps."""
        return int(np.asarray(self.fresh).sum())


def fit_line(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scale and offset f32[C] of the line from x to y, [..., C] each, of least squared error in each channel.

    What is left has the variance (1 - rho^2) var(y). A channel of x that does not vary has scale 1.
    """
    a, b = (z.astype(jnp.float32).reshape(-1, z.shape[-1]) for z in (x, y))
    mean_a, mean_b = a.mean(0), b.mean(0)
    variance = jnp.square(a - mean_a).mean(0)
    flat = variance <= 1e-12 * jnp.maximum(jnp.square(mean_a), 1e-12)
    scale = jnp.where(flat, 1.0, ((a - mean_a) * (b - mean_b)).mean(0) / jnp.where(flat, 1.0, variance))
    return scale, mean_b - scale * mean_a


def distances(split: Split, params: Any, x0: jax.Array, ts: Any, cond: Any = None) -> np.ndarray:
    """What it costs to keep the features of step a up to step b, f64[n+1, n+1]: the sum over steps i in [a, b) of the
    mean absolute difference of F_i and F_a, over Euler's path of the whole model from `x0[B, ...]`. Infinite where
    b <= a. Keeps n sets of features in memory. Raises InputError for a grid that does not increase."""
    check_grid(ts)
    grid = jnp.asarray(ts, jnp.float32)

    @jax.jit
    def walk(params, x, cond):
        def step(x, interval):
            t, s = (jnp.full(x.shape[:1], u) for u in interval)
            features = split.deep(params, x, t, cond)
            return x + bcast(s - t, x) * split.shallow(params, x, t, cond, features), features

        _, kept = jax.lax.scan(step, x, (grid[:-1], grid[1:]))
        flat = kept.astype(jnp.float32).reshape(len(grid) - 1, -1)
        return jax.lax.map(lambda row: jnp.abs(row - flat).mean(1), flat)

    between = np.asarray(walk(params, x0, cond), np.float64)
    n = len(between)
    cost = np.full((n + 1, n + 1), np.inf)
    for a in range(n):
        cost[a, a + 1 :] = np.cumsum(between[a, a:])
    return cost


def schedule(cost: np.ndarray, every: int) -> tuple[int, ...]:
    """The steps to run the deep layers at, once in `every` on average: ceil(n / every) segments of ceil(every / 2) to
    2 every steps, of least total `cost`. Raises ConfigError for an `every` outside 1 to n."""
    n = len(cost) - 1
    if not 1 <= every <= n:
        raise ConfigError(f"every: got {every}, accepts 1 to the number of steps, {n}")
    count = -(-n // every)
    best = segment_dp(cost, count, shortest=-(-every // 2), longest=2 * every)
    return tuple(int(i) for i in best.edges(count)[:-1])


def evenly(n: int, every: int) -> tuple[int, ...]:
    """The schedule without a table: every `every`-th step of n."""
    return tuple(range(0, n, every))


def uncorrected(ts: Any, starts: tuple[int, ...], features: int, channels: int) -> Plan:
    """A plan whose lines change nothing, for `features` channels of features and `channels` of x.

    Raises InputError for a grid that does not increase, or starts that are not 0 and then increasing steps.
    """
    check_grid(ts)
    n = len(ts) - 1
    if not starts or starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)) or starts[-1] >= n:
        raise InputError(f"starts: got {starts}, accepts 0 and then increasing steps under {n}")
    none = lambda size: Line(jnp.ones((n, size)), jnp.zeros((n, size)))  # noqa: E731
    fresh = jnp.zeros(n, bool).at[jnp.asarray(starts)].set(True)
    return Plan(jnp.asarray(ts, jnp.float32), fresh, none(features), none(channels))


def calibrate(
    split: Split, params: Any, x0: jax.Array, ts: Any, cond: Any, starts: tuple[int, ...], quantized: Any = None
) -> Plan:
    """The plan whose lines fit `x0[B, ...]`, by n runs of the deep layers: first those of the kept features, with
    `params`; then, where `quantized` params are given, those from their velocity to that of `params`."""
    like = jax.eval_shape(split.deep, params, x0, jnp.zeros(x0.shape[0]), cond)
    plan = uncorrected(ts, starts, like.shape[-1], x0.shape[-1])
    plan = dataclasses.replace(plan, features=_fit_features(split, params, x0, cond, plan, like))
    if quantized is not None:
        plan = dataclasses.replace(plan, velocity=_fit_velocity(split, params, quantized, x0, cond, plan, like))
    return plan


def _fit_features(split: Split, params: Any, x0: jax.Array, cond: Any, plan: Plan, like: Any) -> Line:
    @jax.jit
    def fit(params, x, cond, plan):
        def step(state, item):
            (x, kept), (t, s, fresh) = state, item
            true = split.deep(params, x, t, cond)
            kept = jnp.where(fresh, true, kept)
            line = Line(*fit_line(kept, true))
            x = x + bcast(s - t, x) * split.shallow(params, x, t, cond, line(kept))
            return (x, kept), line

        return jax.lax.scan(step, (x, jnp.zeros(like.shape, like.dtype)), _steps(plan, x))[1]

    return fit(params, x0, cond, plan)


def _fit_velocity(split: Split, params: Any, quantized: Any, x0: jax.Array, cond: Any, plan: Plan, like: Any) -> Line:
    @jax.jit
    def fit(params, quantized, x, cond, plan):
        def step(state, item):
            (x, kept, true), (t, s, fresh, line) = state, item
            kept = jnp.where(fresh, split.deep(quantized, x, t, cond), kept)
            true = jnp.where(fresh, split.deep(params, x, t, cond), true)
            v = split.shallow(quantized, x, t, cond, line(kept))
            second = Line(*fit_line(v, split.shallow(params, x, t, cond, line(true))))
            return (x + bcast(s - t, x) * second(v), kept, true), second

        zeros = jnp.zeros(like.shape, like.dtype)
        return jax.lax.scan(step, (x, zeros, zeros), (*_steps(plan, x), plan.features))[1]

    return fit(params, quantized, x0, cond, plan)


def _steps(plan: Plan, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Start and end of each step for each row, f32[n, B], and whether the deep layers run."""
    rows = jnp.broadcast_to(plan.ts[:, None], (len(plan.ts), x.shape[0]))
    return rows[:-1], rows[1:], plan.fresh


def sample(split: Split, params: Any, x: jax.Array, cond: Any, plan: Plan) -> Solution:
    """x[B, ...] at ts[0] to ts[-1] by Euler steps, the deep layers at the plan's fresh ones alone. Pure: run it under
    jit, where one program serves every plan of as many steps."""
    like = jax.eval_shape(split.deep, params, x, jnp.zeros(x.shape[0]), cond)

    def step(state, item):
        (x, kept), (t, s, fresh, first, second) = state, item
        kept = jax.lax.cond(fresh, lambda x: split.deep(params, x, t, cond), lambda x: kept, x)
        v = split.shallow(params, x, t, cond, first(kept))
        return ((x + bcast(s - t, x) * second(v)).astype(x.dtype), kept), None

    start = (x, jnp.zeros(like.shape, like.dtype))
    (x, _), _ = jax.lax.scan(step, start, (*_steps(plan, x), plan.features, plan.velocity))
    return Solution(x)
