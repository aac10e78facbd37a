"""MeanFlow: a model of the mean velocity over an interval, so that one evaluation crosses all of it.

With u the mean velocity over [t, s], (s - t) u = int_t^s v, so u = v + (s - t) du/dt along the flow: a target for u
from its own derivative, which one jvp gives. Geng, Deng, Bai, Kolter, He (2025), "Mean Flows for One-step Generative
Modeling", arXiv 2505.13447. Guidance is part of the target, so a guided sample costs no more than an unguided one.
`mean_audio` has the settings of MeanAudio (Li et al. 2025, 2508.06098); its curriculum, instantaneous velocities first
and then the mixture of both, is `Curriculum`. `variant="improved"` is improved MeanFlow (Geng et al. 2025, 2512.02012):
the loss is on the instantaneous velocity u - (s - t) du/dt, and the tangent is the model's own velocity.

Guarantee: a different model; the identity characterises the mean velocity, but the target depends on the model, so no
descent is promised. State: none. Paper's defaults: three quarters of the rows have s = t (`times.Pair`), logit-normal
times, loss e / (e + 0.01)^1 of the squared error e summed over a sample, conditions dropped for a tenth of the rows.

Departures: rows with s = t are drawn independently of rows without a condition (the released code makes both the first
of the batch); improved MeanFlow's scale is fixed here, not drawn per row and given to the model, and its velocity head
is the model at s = t. Models must keep the angular frequencies of their time features low (ten or so): du/dt grows with
them. Attention inside the model must have a forward mode.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.objective import source_like, weighted_mean
from jaxinfer.flow.paths import interpolate, linear
from jaxinfer.flow.solve import FixedStep
from jaxinfer.flow.times import Pair
from jaxinfer.flow.types import (
    Apply,
    Batch,
    Couple,
    DrawTimes,
    MeanVelocityFn,
    Null,
    Objective,
    Path,
    Times,
    bcast,
    drop,
    explicit,
    null,
)

VARIANTS = ("original", "improved")
REDUCTIONS = ("sum", "mean")


@dataclasses.dataclass(frozen=True)
class TargetGuidance:
    """The target's velocity w v + (1 - w - k) v_null + k v_cond, with w `scale`, k `mix`, where t is in [start, end].

    The scale that it amounts to is w / (1 - k). `of(scale)` is improved MeanFlow's form, w = 1 and k = 1 - 1 / scale.
    Raises ConfigError for a mix outside [0, 1) or an interval outside [0, 1].
    """

    scale: float = 1.0
    mix: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not (0 <= self.mix < 1 and abs(self.scale) < float("inf")):
            raise ConfigError(f"guidance: got scale {self.scale}, mix {self.mix}; accepts a number and 0 <= mix < 1")
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(f"guidance: got times [{self.start}, {self.end}], accepts an interval within [0, 1]")

    @classmethod
    def of(cls, scale: float) -> TargetGuidance:
        """With the noise of the path's own velocity at weight 1. ConfigError for a scale under 1."""
        if not scale >= 1:
            raise ConfigError(f"guidance: got scale {scale}, accepts 1 or more")
        return cls(1.0, 1 - 1 / scale)

    @property
    def effective(self) -> float:
        """The scale of ordinary guidance that the trained model shows."""
        return self.scale / (1 - self.mix)


@dataclasses.dataclass(frozen=True)
class MeanFlow:
    """The objective `(apply, params, key, batch) -> (loss, metrics)`.

    power, offset, reduction: the loss of a row is e / stop_gradient(e + offset)^power, with e the squared error, its
    `reduction` over the row's numbers. guide_dropped: whether rows whose condition is the null have guided targets too.
    Raises ConfigError for an unknown variant or reduction, or an offset that is not positive; InputError for guidance
    without a condition.
    """

    path: Path = dataclasses.field(default_factory=linear)
    times: DrawTimes = Pair()
    couple: Couple | None = None
    drop_rate: float = 0.1
    null: Null = null
    guidance: TargetGuidance | None = None
    guide_dropped: bool = False
    variant: str = "original"
    power: float = 1.0
    offset: float = 0.01
    reduction: str = "sum"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant: got {self.variant!r}, accepts {', '.join(VARIANTS)}")
        if self.reduction not in REDUCTIONS:
            raise ConfigError(f"reduction: got {self.reduction!r}, accepts {', '.join(REDUCTIONS)}")
        if not self.offset > 0:
            raise ConfigError(f"offset: got {self.offset}, accepts a positive number")

    def __call__(self, apply: Apply, params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict]:
        if self.guidance is not None and not jax.tree.leaves(batch.cond):
            raise InputError("guidance inside the target needs a condition to leave out, the batch has none")
        source_key, couple_key, time_key, drop_key = jax.random.split(key, 4)
        x0, x1, cond, log_w = source_like(source_key, batch), batch.x1, batch.cond, None
        if self.couple is not None:
            x0, x1, cond, log_w = self.couple(couple_key, x0, x1, cond)
        cond = drop(drop_key, explicit(cond), self.drop_rate, self.null)
        times = self.times(time_key, x1.shape[0])
        x, v = interpolate(self.path, x0, x1, times.t)
        errors = mean_flow_errors(self, apply, params, x, v, times, cond)
        losses = errors / jax.lax.stop_gradient(errors + self.offset) ** self.power
        return weighted_mean(losses, log_w), {"unweighted_loss": errors.mean()}


def mean_audio(**settings: Any) -> MeanFlow:
    """MeanFlow as MeanAudio trains it: guidance of scale 3 (0.3 of the path's velocity, 0.9 of the model's own), in all
    rows, and errors that are means over a sample."""
    defaults = dict(guidance=TargetGuidance(0.3, 0.9), guide_dropped=True, offset=1e-3, reduction="mean")
    return MeanFlow(**{**defaults, **settings})


def mean_flow_errors(
    spec: MeanFlow, apply: Apply, params: Any, x: jax.Array, v: jax.Array, times: Times, cond: Any
) -> jax.Array:
    """The squared error f32[B] of each row to MeanFlow's target; `x[B, ...]` has the path's velocity v at times.t."""
    frozen = jax.lax.stop_gradient(params)
    instant = lambda c: apply(frozen, x, times.t, times.t, c).v  # noqa: E731
    own = spec.variant == "improved" or (spec.guidance is not None and spec.guidance.mix > 0)
    v_cond: Any = instant(cond) if own else None
    goal = v if spec.guidance is None else guided_target(spec, v, v_cond, instant, times.t, cond)
    tangent = v_cond if spec.variant == "improved" else goal
    u, du = with_derivative(apply, params, x, times, cond, tangent)
    ahead = bcast(times.s - times.t, x) * jax.lax.stop_gradient(du)
    if spec.variant == "improved":
        miss = u - ahead - goal
    else:
        miss = u - jax.lax.stop_gradient(goal + ahead)
    squared = jnp.square(miss.astype(jnp.float32)).reshape(x.shape[0], -1)
    return squared.sum(1) if spec.reduction == "sum" else squared.mean(1)


def with_derivative(
    apply: Apply, params: Any, x: jax.Array, times: Times, cond: Any, tangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u(x, t, s)[B, ...] and its total derivative in t where x moves with velocity `tangent` and s stands still."""

    def mean_velocity(x, t, s):
        return apply(params, x, t, s, cond).v

    moving = (tangent.astype(x.dtype), jnp.ones_like(times.t), jnp.zeros_like(times.s))
    return jax.jvp(mean_velocity, (x, times.t, times.s), moving)


def guided_target(spec: MeanFlow, v: jax.Array, v_cond: Any, instant: Any, t: jax.Array, cond: Any) -> jax.Array:
    """The velocity that guidance makes of the path's v[B, ...]; `instant(cond)` is the model's own."""
    guidance = spec.guidance
    assert guidance is not None
    nothing = spec.null(cond)
    found = guidance.scale * v + (1 - guidance.scale - guidance.mix) * instant(nothing)
    if guidance.mix > 0:
        found += guidance.mix * v_cond
    guide = (t >= guidance.start) & (t <= guidance.end)
    if not spec.guide_dropped:
        guide &= ~same_rows(cond, nothing, t.shape[0])
    return jnp.where(bcast(guide, v), found, v)


def same_rows(cond: Any, other: Any, rows: int) -> jax.Array:
    """Whether a row's condition is that of `other`, bool[rows]; never where the two have different parts."""
    same = jnp.ones(rows, bool)
    if jax.tree.structure(cond) != jax.tree.structure(other):
        return ~same
    for one, two in zip(jax.tree.leaves(cond), jax.tree.leaves(other), strict=True):
        same &= (one == two).reshape(rows, -1).all(1)
    return same


@struct.dataclass
class Staged:
    """A batch of a curriculum: `stage i32[]` is 0 for its first objective and 1 for its second."""

    batch: Batch
    stage: jax.Array


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """The objective of a run that begins with one objective and goes on with another, `(apply, params, key, staged)`.

    MeanAudio's, instantaneous to mean: `Curriculum(FlowMatching(), mean_audio(), steps)`. `stage(step)` goes into the
    batches, which are functions of the step, so that a resumed run is where it was. Only one objective is evaluated;
    both must give metrics of the same names. Raises ConfigError for a negative number of steps.
    """

    first: Objective
    second: Objective
    steps: int

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"steps: got {self.steps}, accepts 0 or more updates of the first objective")

    def stage(self, step: int) -> jax.Array:
        """Which objective update `step` (from 0) is of, i32[]."""
        return jnp.asarray(step >= self.steps, jnp.int32)

    def __call__(self, apply: Apply, params: Any, key: jax.Array, staged: Staged) -> tuple[jax.Array, dict]:
        branches = [lambda p, b, o=objective: o(apply, p, key, b) for objective in (self.first, self.second)]
        return jax.lax.switch(staged.stage, branches, params, staged.batch)


def mean_velocity_of(apply: Apply, params: Any, cond: Any) -> MeanVelocityFn:
    """The model's mean velocity under `cond` as a function of (x, t, s, carry), for `solve_mean`."""

    def velocity(x, t, s, carry):
        return apply(params, x, t, s, cond).v, carry

    return velocity


def mean_step(velocity: Any, x: jax.Array, t: jax.Array, s: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """x[B, ...] at t to s by the mean velocity over [t, s], a `MeanVelocityFn`: exact where that is; one evaluation."""
    u, carry = velocity(x, t, s, carry)
    return (x + bcast(s - t, x) * u).astype(x.dtype), carry


solve_mean = FixedStep(mean_step, 1)
