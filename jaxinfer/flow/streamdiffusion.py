"""StreamDiffusion: a live stream of frames through one batch of steps, guided by a residual, similar frames skipped.

Kodaira et al. (2023), "StreamDiffusion: A Pipeline-level Solution for Real-time Interactive Generation", arXiv
2312.12491. The stream batch is `jaxinfer.flow.pipeline`; here are its step for a flow model, and the paper's two
savings. Residual guidance replaces the model's unconditional velocity by the straight line from where a frame is to a
point x_src that stands for "nothing": the frame itself ("self": no extra evaluation), or what the unconditional
model makes of the first step ("onetime": one extra row a tick). The similarity filter skips a frame with a
probability that grows with its cosine to the last one processed.

Guarantee: stream batch: exact. Residual guidance: approximate; at scale 1 it is the conditional velocity, and with
x_src the unconditional model's own end point it is classifier-free guidance. Filter: approximate. State: the
pipeline's; the filter's last frame, its output, and how many were skipped in a row.

Paper's defaults: scale 1.2, delta 1, each step's frame re-noised with noise that is fixed for the step; skip
max(0, (cos - 0.98) / 0.02), at most 10 in a row. Departures: in velocities, v = d v_null + g (v_cond - d v_null) with
v_null = (x_src - x) / (1 - t), where the paper scales noise estimates, which are singular at t = 0; the host's sleep
while frames are skipped is the caller's.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.pipeline import Pipeline, State, Tick
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.types import Apply, Null, VelocityFn, bcast, explicit, null

GUIDANCE = ("none", "full", "self", "onetime")


def toward(source: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    """The velocity of the straight line from x[B, ...] at t f32[B] < 1 to `source` at 1."""
    return (source - x) / bcast(1 - t, x)


def residual(v: jax.Array, v_null: jax.Array, scale: float, delta: float) -> jax.Array:
    """`v` moved away from `delta v_null`."""
    return delta * v_null + scale * (v - delta * v_null)


def first_estimate(null_velocity: VelocityFn, x: jax.Array, t: jax.Array, carry: Any = None) -> jax.Array:
    """Where the unconditional velocity at x[B, ...], t points: the source of onetime guidance."""
    return x + bcast(1 - t, x) * null_velocity(x, t, carry)[0]


def residual_guide(velocity: VelocityFn, source: jax.Array, *, scale: float = 1.2, delta: float = 1.0) -> VelocityFn:
    """Residual guidance as a guide of any solver: `source[B, ...]` is the latents that the sample started from (self)
    or `first_estimate` (onetime). Times must stay under 1."""

    def guided(x, t, carry):
        v, carry = velocity(x, t, carry)
        return residual(v, toward(source, x, t), scale, delta), carry

    return guided


@struct.dataclass
class Frame:
    """What travels: latents x[...] and the source of its residual guidance, of the same shape."""

    x: jax.Array
    source: jax.Array


@struct.dataclass
class Context:
    """What every step reads: the model's params; the stream's condition, leaves that lead with 1, or None; the noise
    of each step, f[T, ...]."""

    params: Any
    cond: Any
    noise: jax.Array


@dataclasses.dataclass(frozen=True)
class StreamDiffusion:
    """Latents of frames, one a tick, through the steps of the grid `ts` (T + 1 times, from the strength of the noise to
    1), by a model of velocities on the linear path.

    guidance: "none", "full" (classifier-free: 2 T rows a tick), "self" (T rows) or "onetime" (T + 1). renoise: each
    step estimates the end and adds its own noise again (the paper's), else it is one of Euler's.
    Raises InputError for a grid that does not increase, ConfigError for one that does not end at 1 or for an unknown
    guidance; InputError, at the first tick, for guidance from the null of a stream without a condition.
    """

    apply: Apply
    ts: tuple[float, ...]
    guidance: str = "self"
    scale: float = 1.2
    delta: float = 1.0
    renoise: bool = True
    null: Null = null

    def __post_init__(self):
        check_grid(self.ts)
        if self.ts[-1] != 1:
            raise ConfigError(f"ts: got a grid that ends at {self.ts[-1]:g}, accepts one that ends at 1")
        if self.guidance not in GUIDANCE:
            raise ConfigError(f"guidance: got {self.guidance!r}, accepts {', '.join(GUIDANCE)}")

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline whose params are a `Context` and whose frames are those of `admit`."""
        return Pipeline(self.stage, len(self.ts) - 1)

    def admit(self, context: Context, latents: jax.Array) -> Frame:
        """A frame's clean latents [...] with noise to the first time of the grid."""
        t = self.ts[0]
        return Frame((t * latents + (1 - t) * context.noise[0]).astype(latents.dtype), latents)

    def stage(self, context: Context, frames: Frame, k: jax.Array, resident: Any) -> tuple[Frame, Any]:
        """Rows of `frames [R, ...]`, each by its step k i32[R]; the first row alone may be at step 0."""
        grid = jnp.asarray(self.ts, jnp.float32)
        t, s, x = grid[k], grid[k + 1], frames.x
        v, source = self._velocity(context, frames, t, k)
        if self.renoise:
            last = len(self.ts) - 2
            noise = context.noise[jnp.minimum(k + 1, last)]  # at the end, s = 1, none is added
            after = bcast(s, x) * (x + bcast(1 - t, x) * v) + bcast(1 - s, x) * noise
        else:
            after = x + bcast(s - t, x) * v
        return Frame(after.astype(x.dtype), source), resident

    def _velocity(self, context: Context, frames: Frame, t: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The guided velocity of each row, and its source from here on."""
        x, rows = frames.x, len(k)
        cond = of_rows(explicit(context.cond), rows)
        extra = {"none": 0, "self": 0, "onetime": 1, "full": rows}[self.guidance]
        if extra and not jax.tree.leaves(cond):
            raise InputError(f"guidance {self.guidance!r} needs a condition to leave out, got none")
        if extra:
            cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, of_rows(self.null(context.cond), extra))
        times = jnp.concatenate([t, t[:extra]])
        found = self.apply(context.params, jnp.concatenate([x, x[:extra]]), times, times, cond).v
        v, v_null = found[:rows], found[rows:]
        if self.guidance == "none":
            return v, frames.source
        if self.guidance == "full":
            return residual(v, v_null, self.scale, 1.0), frames.source
        source = frames.source
        if self.guidance == "onetime":
            estimate = x[0] + (1 - t[0]) * v_null[0]
            source = source.at[0].set(jnp.where(k[0] == 0, estimate, source[0]).astype(source.dtype))
        return residual(v, toward(source, x, t), self.scale, self.delta), source


def of_rows(cond: Any, rows: int) -> Any:
    """A condition whose leaves lead with 1, for `rows` rows."""
    return jax.tree.map(lambda c: jnp.repeat(c, rows, 0), cond)


@struct.dataclass
class Filtered:
    """The filter's state: the pipeline's, the last frame that was processed and what came out then; how many frames
    were skipped in a row since, i32[], and in all, i32[]; whether there is a last frame."""

    inner: State
    last: jax.Array
    out: Tick
    in_a_row: jax.Array
    skipped: jax.Array
    started: jax.Array


@dataclasses.dataclass(frozen=True)
class SimilarityFilter:
    """Skips a frame with probability max(0, (cos - threshold) / (1 - threshold)), never more than `most` in a row.

    Raises ConfigError for a threshold outside [0, 1) or a negative `most`.
    """

    threshold: float = 0.98
    most: int = 10

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold: got {self.threshold}, accepts 0 or more and under 1")
        if self.most < 0:
            raise ConfigError(f"most: got {self.most}, accepts 0 or more frames in a row")

    def init(self, inner: State, frame: jax.Array, out: Tick) -> Filtered:
        """Nothing processed yet. `frame` is like what is compared, `out` like what the pipeline puts out."""
        zero = jnp.zeros((), jnp.int32)
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
        return Filtered(inner, jnp.zeros_like(frame), blank, zero, zero, jnp.zeros((), bool))

    def probability(self, frame: jax.Array, last: jax.Array) -> jax.Array:
        """How likely `frame` is skipped after `last`, f32[]."""
        a, b = frame.astype(jnp.float32).ravel(), last.astype(jnp.float32).ravel()
        cosine = a @ b / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-12)
        return jnp.clip((cosine - self.threshold) / (1 - self.threshold), 0, 1)

    def tick(self, key: jax.Array, state: Filtered, frame: jax.Array, advance: Any) -> tuple[Filtered, Tick]:
        """`advance(state.inner) -> (inner, Tick)`, or, where `frame` is skipped, the output of before and no work.

        key: one a frame; `frame` is what similarity is measured on (pixels or latents of any shape).
        """
        skip = jax.random.uniform(key) < self.probability(frame, state.last)
        skip &= state.started & (state.in_a_row < self.most)

        def leave(state):
            return dataclasses.replace(state, in_a_row=state.in_a_row + 1, skipped=state.skipped + 1)

        def process(state):
            inner, out = advance(state.inner)
            return Filtered(inner, frame, out, jnp.zeros_like(state.in_a_row), state.skipped, jnp.ones((), bool))

        state = jax.lax.cond(skip, leave, process, state)
        return state, state.out
