"""Blockwise flow matching: each segment of time has its own small velocity block, all guided by one feature network.

Park, Lee, Joo, Kim (2025), "Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation", arXiv 2510.21167. [0, 1] is cut into M equal segments. A feature network makes tokens h of (x_t, t,
condition), trained to agree with a frozen encoder's tokens of the clean data (semantic feature guidance); block k turns
x_t and h into the velocity of segment k. Feature residual approximation then trains a small network r with all else
frozen, so that h at t is h at the segment's start plus (t - start) / (end - start) r(x_t, t): after the first step of a
segment the feature network is not run.

Guarantee: a different model; with one segment and no alignment it is flow matching. The approximation is exact at the
start of a segment. State: a segment's first features while it is walked.

Paper's defaults: 6 segments, batches split evenly over them, alignment weight 0.05, a tenth of the conditions dropped;
8 Euler steps a segment. Departures: parts are those of `blockwise_network` (a modulation of its own for every block in
place of a shared one with low-rank corrections); the state stays in the model's dtype; the sampler is the ODE's.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.alignment import Aligned, alignment_losses
from jaxinfer.flow.guide import Guidance
from jaxinfer.flow.objective import source_like
from jaxinfer.flow.paths import interpolate, linear
from jaxinfer.flow.times import Stratified
from jaxinfer.flow.types import Batch, Null, Out, Path, Solution, bcast, drop, explicit, null, per_example


class Parts(Protocol):
    """A blockwise model: pure functions of `params`, a dict whose "blocks" have leaves [M, ...], a row a segment, and
    whose "residual" is the approximation's network. x[B, ...], t f32[B], h[B, N, D]."""

    @property
    def segments(self) -> int:
        """M."""
        ...

    def features(self, params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        """h[B, N, D]."""
        ...

    def velocity(self, params: Any, block: Any, x: jax.Array, t: jax.Array, cond: Any, h: jax.Array) -> jax.Array:
        """v like x, by one segment's `block` (leaves of params["blocks"] without their first axis)."""
        ...

    def residual(self, params: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        """r[B, N, D], by params["residual"]."""
        ...

    def project(self, params: Any, h: jax.Array) -> jax.Array:
        """[B, N, E], to be compared with the encoder's tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class AnySegment:
    """The parts as a slot's `apply`: any row in any segment (`seg i32[B]`, or that of its time), by evaluating all M
    blocks and choosing. For evaluations with mixed times; training and sampling below run one block a row."""

    parts: Parts

    def __call__(self, params, x, t, s, cond, *, seg=None, features=None) -> Out:
        m = self.parts.segments
        seg = jnp.clip(jnp.floor(t * m).astype(jnp.int32), 0, m - 1) if seg is None else seg
        h = self.parts.features(params, x, t, cond) if features is None else features
        one = lambda block: self.parts.velocity(params, block, x, t, cond, h)  # noqa: E731
        every = jax.lax.map(one, params["blocks"])
        return Out(every[seg, jnp.arange(x.shape[0])], {"features": h})


def by_segment(tree: Any, segments: int) -> Any:
    """Leaves [B, ...] whose row i is of segment i mod M (as `times.Stratified` has it) as [M, B / M, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, segments, *x.shape[1:]).swapaxes(0, 1), tree)


def training_velocity(parts: Parts, params: Any, x: jax.Array, t: jax.Array, cond: Any, h: jax.Array) -> jax.Array:
    """v[B, ...] where row i is of segment i mod M: each block on its rows alone. InputError unless M divides B."""
    m = parts.segments
    if x.shape[0] % m:
        raise InputError(f"batch: {x.shape[0]} rows cannot be split over {m} segments evenly")
    split = by_segment((x, t, cond, h), m)
    found = jax.vmap(lambda block, rows: parts.velocity(params, block, *rows))(params["blocks"], split)
    return found.swapaxes(0, 1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """The objective `(parts, params, key, batch) -> (loss, metrics)` of features and blocks; `batch`: an `Aligned`, or
    a `Batch` where `align` is 0."""

    path: Path = dataclasses.field(default_factory=linear)
    align: float = 0.05
    drop_rate: float = 0.1
    null: Null = null

    def __call__(self, parts: Parts, params: Any, key: jax.Array, batch: Aligned | Batch) -> tuple[jax.Array, dict]:
        if self.align and not isinstance(batch, Aligned):
            raise ConfigError(f"align {self.align} needs the encoder's tokens: a batch of Aligned, got Batch")
        data = batch.batch if isinstance(batch, Aligned) else batch
        # Split as flow matching splits its key, so that one segment gives the same numbers.
        source_key, _, time_key, drop_key = jax.random.split(key, 4)
        x0, cond = source_like(source_key, data), drop(drop_key, data.cond, self.drop_rate, self.null)
        t = Stratified(parts.segments)(time_key, data.x1.shape[0]).t
        x, v = interpolate(self.path, x0, data.x1, t)
        h = parts.features(params, x, t, cond)
        loss = per_example(jnp.square(training_velocity(parts, params, x, t, cond, h) - v)).mean()
        metrics = {"velocity_loss": loss}
        if isinstance(batch, Aligned) and self.align:
            metrics["alignment"] = alignment_losses(parts.project(params, h), batch.targets).mean()
            loss += (self.align if batch.weight is None else batch.weight) * metrics["alignment"]
        return loss, metrics


def approximate(h_start: jax.Array, r: jax.Array, t: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Features[B, N, D] at t f32[B] from those at the segment's start and the residual network's r[B, N, D]."""
    return h_start + bcast((t - start) / (end - start), r).astype(r.dtype) * r


@dataclasses.dataclass(frozen=True)
class FeatureResidual:
    """The objective of the approximation, `(parts, residual_params, key, batch, frozen) -> (loss, metrics)`; `frozen`:
    the trained model's params, whose own "residual", if there is one, is not read. The same pair gives the point at the
    segment's start and the one at t."""

    path: Path = dataclasses.field(default_factory=linear)
    drop_rate: float = 0.1
    null: Null = null

    def __call__(
        self, parts: Parts, residual_params: Any, key: jax.Array, batch: Batch, frozen: Any
    ) -> tuple[jax.Array, dict]:
        source_key, time_key, drop_key = jax.random.split(key, 3)
        x0, cond = source_like(source_key, batch), drop(drop_key, batch.cond, self.drop_rate, self.null)
        times = Stratified(parts.segments)(time_key, batch.x1.shape[0])
        start = times.seg / parts.segments
        x, _ = interpolate(self.path, x0, batch.x1, times.t)
        x_start, _ = interpolate(self.path, x0, batch.x1, start)
        params = {**frozen, "residual": residual_params}
        h, h_start = parts.features(frozen, x, times.t, cond), parts.features(frozen, x_start, start, cond)
        r = parts.residual(params, x, times.t, cond)
        near = approximate(h_start, r, times.t, start, (times.seg + 1) / parts.segments)
        loss = per_example(jnp.square(near - h)).mean()
        return loss, {"held": per_example(jnp.square(h_start - h)).mean()}


def sample(
    parts: Parts,
    params: Any,
    x: jax.Array,
    cond: Any,
    *,
    steps: int = 8,
    guidance: Guidance = Guidance(),  # noqa: B008 - immutable
    approximated: bool = True,
    null: Null = null,
) -> Solution:
    """x[B, ...] at 0 through all segments with `steps` equal Euler steps each.

    approximated: the feature network runs once a segment, the residual network at its other steps; else the feature
    network at all. Guidance runs every row twice. Raises ConfigError for steps under 1, or an approximation without a
    trained residual network; InputError for guidance without a condition.
    """
    if steps < 1:
        raise ConfigError(f"steps: got {steps} a segment, accepts 1 or more")
    if approximated and "residual" not in params and steps > 1:
        raise ConfigError('approximated: params have no "residual"; train FeatureResidual, or pass approximated=False')
    guided = guidance.scale != 1.0
    if guided and not jax.tree.leaves(cond):
        raise InputError(f"guidance of scale {guidance.scale:g} needs a condition to leave out, got none")
    if guided:
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), explicit(cond), null(cond))
    twice = lambda a: jnp.concatenate([a, a]) if guided else a  # noqa: E731
    m, rows = parts.segments, x.shape[0]

    def velocity(block, x, t, h):
        v = parts.velocity(params, block, twice(x), twice(t), cond, h)
        if not guided:
            return v
        v, v_null = v[:rows], v[rows:]
        inside = (t >= guidance.start) & (t <= guidance.end)
        return jnp.where(bcast(inside, v), v_null + guidance.scale * (v - v_null), v)

    def segment(x, item):
        block, k = item
        start, end = jnp.full((rows,), k / m), jnp.full((rows,), (k + 1) / m)
        width = 1 / (m * steps)
        features = lambda x, t: parts.features(params, twice(x), twice(t), cond)  # noqa: E731
        advance = lambda x, t, h: (x + width * velocity(block, x, t, h)).astype(x.dtype)  # noqa: E731

        def whole(x, i):
            t = start + i * width
            return advance(x, t, features(x, t)), None

        if not approximated or steps == 1:
            return jax.lax.scan(whole, x, jnp.arange(steps, dtype=jnp.float32))
        first = features(x, start)

        def near(x, i):
            t = start + i * width
            r = parts.residual(params, twice(x), twice(t), cond)
            return advance(x, t, approximate(first, r, twice(t), twice(start), twice(end))), None

        return jax.lax.scan(near, advance(x, start, first), jnp.arange(1, steps, dtype=jnp.float32))

    x, _ = jax.lax.scan(segment, x, (params["blocks"], jnp.arange(m, dtype=jnp.float32)))
    return Solution(x)
