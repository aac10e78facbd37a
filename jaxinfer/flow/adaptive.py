"""Adaptive sampling, inversion and likelihood: the flow as an ordinary differential equation with error control.

Dormand and Prince's fifth-order pair (1980) through diffrax with a PID controller, each row with steps of its own, so
that a row does not depend on its neighbours; `likelihood` adds the divergence along the way, exactly or by Hutchinson's
estimate (Grathwohl et al. 2018, arXiv:1810.01367). Approximate, to the tolerance. State: none. Latent flow matching
samples with tolerances of 1e-5 (Dao et al. 2023, arXiv:2307.08698). Departure: there one step size serves the batch.

Needs diffrax, of the extra `flow`.

Stability: experimental.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.types import VelocityFn

VelocityOf = Callable[[Any], VelocityFn]  # a batch's condition -> its velocity


class Adaptive(NamedTuple):
    """x[B, ...] at the end, evaluations i32[B] of the velocity, and ok bool[B]: False where max_steps ran out."""

    x: jax.Array
    evaluations: jax.Array
    ok: jax.Array


class Likelihood(NamedTuple):
    """log_p f32[B] in nats, the source points x0[B, ...] that the data came from, evaluations i32[B], ok bool[B]."""

    log_p: jax.Array
    x0: jax.Array
    evaluations: jax.Array
    ok: jax.Array


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Error control: relative and absolute tolerance of a step, and the most steps before a row is given up."""

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 1000

    def __post_init__(self):
        if min(self.rtol, self.atol) <= 0 or self.max_steps < 1:
            raise ConfigError(f"tolerances must be above 0 and max_steps at least 1, got {self}")


def _diffrax() -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ConfigError("adaptive solvers need diffrax: pip install 'jaxinfer[flow]'") from error
    return diffrax


def _integrate(field: Callable, y: Any, start: float, end: float, tolerance: Tolerance) -> tuple[Any, Any, Any]:
    """(y at `end`, evaluations, ok) of dy/dt = field(t, y) for one row."""
    diffrax = _diffrax()
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(t, y)),
        diffrax.Dopri5(),
        t0=start,
        t1=end,
        dt0=None,
        y0=y,
        stepsize_controller=diffrax.PIDController(rtol=tolerance.rtol, atol=tolerance.atol),
        max_steps=tolerance.max_steps,
        throw=False,
    )
    # Six new stages a step (the seventh is the next one's first), one at the start and one for the first step's size.
    evaluations = 6 * found.stats["num_steps"] + 2
    return jax.tree.map(lambda leaf: leaf[0], found.ys), evaluations, found.result == diffrax.RESULTS.successful


def _check(start: float, end: float) -> None:
    if not (0 <= start <= 1 and 0 <= end <= 1 and start != end):
        raise InputError(f"start and end must be two different times in [0, 1], got {start} and {end}")


def dopri5(
    velocity_of: VelocityOf,
    x: jax.Array,
    cond: Any = None,
    *,
    start: float = 0.0,
    end: float = 1.0,
    tolerance: Tolerance = Tolerance(),
) -> Adaptive:
    """From x[B, ...] at `start` to `end`; start = 1, end = 0 inverts. `cond` leads with B; velocity_of sees one row's.

    Raises `ConfigError` without diffrax, `InputError` for times outside [0, 1].
    """
    _check(start, end)

    def row(x, cond):
        velocity = velocity_of(jax.tree.map(lambda leaf: leaf[None], cond))
        field = lambda t, x: velocity(x[None], jnp.full((1,), t, jnp.float32), None)[0][0]  # noqa: E731
        return _integrate(field, x, start, end, tolerance)

    return Adaptive(*jax.vmap(row)(x, cond))


def exact_divergence(field: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(field(x), trace of its Jacobian) at one x[...]; as many forward derivatives as x has numbers."""
    flat = lambda v: field(v.reshape(x.shape)).reshape(-1)  # noqa: E731
    return field(x), jnp.trace(jax.jacfwd(flat)(x.reshape(-1)))


def hutchinson_divergence(
    field: Callable[[jax.Array], jax.Array], x: jax.Array, probes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(field(x), an unbiased estimate of its divergence) from probes[P, ...] of independent signs."""
    v, push = jax.linearize(field, x)
    return v, jax.vmap(lambda probe: jnp.vdot(probe, push(probe)))(probes).mean()


def likelihood(
    velocity_of: VelocityOf,
    x: jax.Array,
    cond: Any = None,
    *,
    key: jax.Array | None = None,
    probes: int = 1,
    tolerance: Tolerance = Tolerance(),
) -> Likelihood:
    """log p(x) of data x[B, ...] under the flow from a standard normal, in nats.

    Without a key the divergence is exact; with one it is Hutchinson's, from `probes` signs a row that stay the same
    along the way. Raises as `dopri5` does.
    """
    if probes < 1:
        raise ConfigError(f"probes must be at least 1, got {probes}")
    shape = (x.shape[0], probes, *x.shape[1:])
    if key is not None:  # a key a row, so that a row's estimate is its own
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(x.shape[0]))
        signs = jax.vmap(lambda k: jax.random.rademacher(k, shape[1:], x.dtype))(keys)
    else:
        signs = jnp.zeros((x.shape[0], 0))

    def row(x, cond, signs):
        velocity = velocity_of(jax.tree.map(lambda leaf: leaf[None], cond))

        def field(t, state):
            at = lambda x: velocity(x[None], jnp.full((1,), t, jnp.float32), None)[0][0]  # noqa: E731
            return exact_divergence(at, state[0]) if key is None else hutchinson_divergence(at, state[0], signs)

        return _integrate(field, (x, jnp.zeros((), jnp.float32)), 1.0, 0.0, tolerance)

    (x0, change), evaluations, ok = jax.vmap(row)(x, cond, signs)
    flat = x0.reshape(x0.shape[0], -1).astype(jnp.float32)
    source = -0.5 * jnp.sum(flat * flat, 1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)
    # `change` is the integral of the divergence from 1 down to 0, minus that from 0 up to 1.
    return Likelihood(source + change, x0, evaluations, ok)
