"""What the seven slots of flow matching pass to each other: paths, times, a model's output, conditions, a batch.

A method is a choice of `path`, `couple`, `times`, `apply`, `objective`, `guide` and `solve`, each a small pure function
of the shape named here. t = 0 is the source (noise), t = 1 the data; `t` and `s` are always float32[B], `s` is the end
of the interval that a mean velocity is over and equals `t` for an instantaneous one; weights are log-weights, f32[B].
x is any float array that leads with the batch, [B, ...].

Stability: experimental.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

AnyArray = jax.Array | np.ndarray


class Times(NamedTuple):
    """Drawn times: start t f32[B], end s f32[B] with s >= t, and the segment of [0, 1] that t lies in, seg i32[B]."""

    t: jax.Array
    s: jax.Array
    seg: jax.Array


class Out(NamedTuple):
    """What a velocity model gives: v[B, ...] like x, and whatever else was asked for, such as inner features."""

    v: jax.Array
    aux: dict[str, Any]


class Solution(NamedTuple):
    """x[B, ...] at the last time; the guide's carry there; x at every time [K+1, B, ...], where it was asked for."""

    x: jax.Array
    carry: Any = None
    trajectory: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Path:
    """An affine path x_t = a(t) x1 + b(t) x0 with its derivatives da, db, each a function of f32[B].

    Hashable, so that it may be static under `jax.jit`; make one by `jaxinfer.flow.paths`.
    """

    a: Callable[[jax.Array], jax.Array]
    b: Callable[[jax.Array], jax.Array]
    da: Callable[[jax.Array], jax.Array]
    db: Callable[[jax.Array], jax.Array]
    name: str = "custom"


@struct.dataclass
class Condition:
    """What a sample is asked to be; a part that is None is not conditioned on.

    labels i32[B], -1 is the null class. tokens f32[B,L,C] with keep bool[B]: False puts the model's learned null token
    in place of the row's tokens. image f32[B,H,W,C] is concatenated to x along its channels (inpainting, label maps).
    """

    labels: AnyArray | None = None
    tokens: AnyArray | None = None
    keep: AnyArray | None = None
    image: AnyArray | None = None


@struct.dataclass
class Batch:
    """Training data: x1[B, ...], its condition (any pytree that leads with B, or None), and the source x0[B, ...]
    where pairs are given; None draws a standard normal one."""

    x1: jax.Array
    cond: Any = None
    x0: jax.Array | None = None


class Apply(Protocol):
    """The model: velocity at x[B, ...], t f32[B], over the interval to s f32[B] (s = t: instantaneous).

    seg i32[B] picks a blockwise model's block; features are what such a model computed before and may use again.
    """

    def __call__(
        self, params: Any, x: jax.Array, t: jax.Array, s: jax.Array, cond: Any, *, seg: Any = None, features: Any = None
    ) -> Out: ...


Null = Callable[[Any], Any]  # cond -> the condition of nothing, with the same tree, shapes and dtypes
Couple = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any, jax.Array]]
"""(key, x0[B, ...], x1[B, ...], cond) -> (x0, x1, cond, log_w f32[B])."""
DrawTimes = Callable[[jax.Array, int], Times]
"""(key, B) -> Times."""
Objective = Callable[[Apply, Any, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""(apply, params, key, batch) -> (loss f32[], metrics)."""
VelocityFn = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(x[B, ...], t f32[B], carry) -> (v[B, ...], carry)."""
MeanVelocityFn = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""(x[B, ...], t f32[B], s f32[B], carry) -> (mean velocity over [t, s], carry)."""
Guide = Callable[[VelocityFn], VelocityFn]
Solve = Callable[[VelocityFn, jax.Array, jax.Array, Any], Solution]
"""(velocity, x[B, ...], ts f32[K+1], carry) -> Solution at ts[-1]."""


def bcast(t: jax.Array, x: jax.Array) -> jax.Array:
    """t[B] with x's number of axes, to be multiplied by it."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def per_example(values: jax.Array) -> jax.Array:
    """The mean of values[B, ...] over all axes but the first: f32[B]."""
    return values.astype(jnp.float32).reshape(values.shape[0], -1).mean(1)


def null(cond: Any) -> Any:
    """The null of a `Condition` (or of None): the null class and the null tokens. The image stays: where to paint is
    not what guidance strengthens."""
    if cond is None:
        return None
    labels = None if cond.labels is None else jnp.full_like(cond.labels, -1)
    keep = None if cond.tokens is None else jnp.zeros(cond.tokens.shape[0], bool)
    return dataclasses.replace(cond, labels=labels, keep=keep)


def explicit(cond: Any) -> Any:
    """`cond` with the parts that its null has: `keep` stands where there are tokens."""
    if isinstance(cond, Condition) and cond.tokens is not None and cond.keep is None:
        return dataclasses.replace(cond, keep=jnp.ones(cond.tokens.shape[0], bool))
    return cond


def drop(key: jax.Array, cond: Any, rate: float, null: Null = null) -> Any:
    """`cond` with each row replaced by its null with probability `rate`: what makes guidance possible later."""
    leaves = jax.tree.leaves(cond)
    if not leaves or not rate:
        return cond
    dropped = jax.random.bernoulli(key, rate, (leaves[0].shape[0],))
    cond = explicit(cond)
    return jax.tree.map(lambda x, nothing: jnp.where(bcast(dropped, x), nothing, x), cond, null(cond))
