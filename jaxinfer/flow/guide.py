"""Classifier-free guidance of a velocity: v = v_null + scale (v_cond - v_null), in an interval of times or in all.

Ho and Salimans 2022 (arXiv:2207.12598); the interval is Kynkäänniemi et al. 2024 (arXiv:2404.07724). A different model:
it samples from neither conditional nor unconditional law, scale 1 apart, which is the conditional velocity to the bit.
State: none; the carry passes through. Latent flow matching uses scale 1.5 (arXiv:2307.08698), no interval. Departure:
outside the interval the null is not evaluated at all.

Stability: experimental.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.types import Apply, Null, VelocityFn, bcast, null


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strongly a condition is followed. scale 1 is no guidance; times in [start, end] are guided."""

    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 0 <= self.start < self.end <= 1:
            raise ConfigError(f"the guidance interval must be within [0, 1], got [{self.start}, {self.end}]")
        if not abs(self.scale) < float("inf"):
            raise ConfigError(f"the guidance scale must be finite, got {self.scale}")


UNGUIDED = Guidance()


def unguided(apply: Apply, params: Any, cond: Any) -> VelocityFn:
    """The model's instantaneous velocity under `cond` as a function of (x, t, carry)."""

    def velocity(x, t, carry):
        return apply(params, x, t, t, cond).v, carry

    return velocity


def cfg(velocity: VelocityFn, null_velocity: VelocityFn, guidance: Guidance) -> VelocityFn:
    """`velocity` moved away from `null_velocity`. All rows of a call must have the same time where an interval is set:
    the null is evaluated for all rows or for none."""
    if guidance.scale == 1.0:
        return velocity

    def guided(x, t, carry):
        inside = (t >= guidance.start) & (t <= guidance.end)

        def toward(v):
            base, _ = null_velocity(x, t, None)
            return jnp.where(bcast(inside, v), base + guidance.scale * (v - base), v)

        v, carry = velocity(x, t, carry)
        if (guidance.start, guidance.end) == (0.0, 1.0):
            return toward(v), carry
        return jax.lax.cond(jnp.any(inside), toward, lambda v: v, v), carry

    return guided


def guided(apply: Apply, params: Any, cond: Any, guidance: Guidance, null: Null = null) -> VelocityFn:
    """The model's velocity under `cond` with guidance. Raises `InputError` where there is nothing to leave out."""
    velocity = unguided(apply, params, cond)
    if guidance.scale == 1.0:
        return velocity
    if not jax.tree.leaves(cond):
        raise InputError(f"guidance of scale {guidance.scale:g} needs a condition to leave out, got none")
    return cfg(velocity, unguided(apply, params, null(cond)), guidance)


def baked(velocity: VelocityFn) -> VelocityFn:
    """The guide of a model that was trained on guided targets: nothing is left to do."""
    return velocity
