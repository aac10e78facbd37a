"""Fixed-step solvers of dx/dt = v(x, t): Euler, Heun and midpoint over any increasing grid, forward and backward.

One `lax.scan` over the grid; global error of order 1, 2 and 2 in the step (Euler 1768; Heun 1900; Runge 1895).
Approximate: exact as the grid is refined. State: x and the carry. `inverse` runs any of them from data to source,
which is how an image is inverted. Latent flow matching (arXiv:2307.08698) takes 50 steps, or `jaxinfer.flow.adaptive`.

Stability: internal.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.types import Solution, VelocityFn, bcast

Step = Callable[[VelocityFn, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def _advance(x: jax.Array, v: jax.Array, dt: jax.Array) -> jax.Array:
    return (x + bcast(dt, x) * v).astype(x.dtype)


def euler_step(velocity: VelocityFn, x: jax.Array, t: jax.Array, s: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """x[B, ...] at t f32[B] to s f32[B] by the velocity at t; one evaluation."""
    v, carry = velocity(x, t, carry)
    return _advance(x, v, s - t), carry


def heun_step(velocity: VelocityFn, x: jax.Array, t: jax.Array, s: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """By the mean of the velocity at t and the one where that leads to; two evaluations."""
    first, carry = velocity(x, t, carry)
    second, carry = velocity(_advance(x, first, s - t), s, carry)
    return _advance(x, 0.5 * (first + second), s - t), carry


def midpoint_step(velocity: VelocityFn, x: jax.Array, t: jax.Array, s: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
    """By the velocity half-way; two evaluations."""
    first, carry = velocity(x, t, carry)
    v, carry = velocity(_advance(x, first, 0.5 * (s - t)), 0.5 * (s + t), carry)
    return _advance(x, v, s - t), carry


@dataclasses.dataclass(frozen=True)
class FixedStep:
    """A solver `(velocity, x[B, ...], ts[K+1], carry=None, trajectory=False) -> Solution`.

    `evaluations`: of the velocity, a step. Raises `InputError` for a grid that does not increase.
    """

    step: Step
    evaluations: int

    def __call__(
        self, velocity: VelocityFn, x: jax.Array, ts: Any, carry: Any = None, *, trajectory: bool = False
    ) -> Solution:
        check_grid(ts)
        ts = jnp.asarray(ts, jnp.float32)

        def body(state, interval):
            x, carry = state
            t, s = (jnp.full((x.shape[0],), u) for u in interval)
            x, carry = self.step(velocity, x, t, s, carry)
            return (x, carry), x if trajectory else None

        (end, carry), xs = jax.lax.scan(body, (x, carry), (ts[:-1], ts[1:]))
        return Solution(end, carry, None if xs is None else jnp.concatenate([x[None], xs]))


euler = FixedStep(euler_step, 1)
heun = FixedStep(heun_step, 2)
midpoint = FixedStep(midpoint_step, 2)
SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint}


def by_name(name: str) -> FixedStep:
    """Raises `ConfigError` for a name that is not in SOLVERS."""
    if name not in SOLVERS:
        raise ConfigError(f"solver {name!r} is none of {', '.join(SOLVERS)}")
    return SOLVERS[name]


def inverse(
    solver: FixedStep, velocity: VelocityFn, x: jax.Array, ts: Any, carry: Any = None, *, trajectory: bool = False
) -> Solution:
    """From x at ts[-1] back to ts[0]: the solver on the field with its time and sign reversed. `ts` increases."""
    check_grid(ts)
    ts = jnp.asarray(ts, jnp.float32)

    def backward(x, u, carry):
        v, carry = velocity(x, 1.0 - u, carry)
        return -v, carry

    return solver(backward, x, (1.0 - ts)[::-1], carry, trajectory=trajectory)
