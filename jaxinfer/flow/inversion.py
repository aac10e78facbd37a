"""Editing by inversion: run the flow back from an image under one condition, and forward again under another.

The deterministic inversion of Song, Meng, Ermon 2020 (arXiv:2010.02502, for diffusion) on a velocity field, as latent
flow matching has it (arXiv:2307.08698). Under the same condition the round trip is the identity up to the solver's
error; under another it is approximate: what both conditions share is kept. State: none. Default: all the way back to
the source; a later `start` changes less.

Stability: experimental.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import InputError
from jaxinfer.flow.schedule import check_grid
from jaxinfer.flow.solve import FixedStep, inverse
from jaxinfer.flow.types import VelocityFn


def from_time(ts: Any, start: float) -> jax.Array:
    """The grid `ts` squeezed into [start, 1], so that it keeps its number of steps."""
    if not 0 <= start < 1:
        raise InputError(f"start must be in [0, 1), got {start}")
    check_grid(ts)
    return start + (1.0 - start) * jnp.asarray(ts, jnp.float32)


def edit(solver: FixedStep, source: VelocityFn, target: VelocityFn, x: jax.Array, ts: Any) -> jax.Array:
    """x[B, ...] at ts[-1], taken back to ts[0] by `source` and forward by `target`: like x."""
    return solver(target, inverse(solver, source, x, ts).x, ts).x
