"""Flow matching: regress a model's velocity on the velocity of the path between a source point and a data point.

Lipman, Chen, Ben-Hamu, Nickel, Le 2022 (arXiv:2210.02747); in a latent space Dao, Phung, Nguyen, Tran 2023
(arXiv:2307.08698). Approximate: at the minimum the flow has the data's law, and the loss says how far from it the
velocity is, plus a constant. State: none. Defaults of latent flow matching: linear path with sigma_min = 1e-5, uniform
times, conditions dropped for 10 % of the rows so that the model can be guided. Departure: a coupling and its
log-weights are part of the objective (independent pairs of weight 1 by default).

Stability: experimental.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.flow.paths import interpolate, linear
from jaxinfer.flow.times import Uniform
from jaxinfer.flow.types import Apply, Batch, Couple, DrawTimes, Null, Path, Times, drop, null, per_example


def fm_losses(
    apply: Apply, params: Any, path: Path, times: Times, x0: jax.Array, x1: jax.Array, cond: Any
) -> jax.Array:
    """Mean squared error of the velocity of each row, f32[B], at `times` on the path from x0 to x1[B, ...]."""
    x, v = interpolate(path, x0, x1, times.t)
    return per_example(jnp.square(apply(params, x, times.t, times.s, cond, seg=times.seg).v - v))


def weighted_mean(losses: jax.Array, log_w: jax.Array | None) -> jax.Array:
    """The mean of losses f32[B] under weights exp(log_w), scaled to a mean of 1 over the batch."""
    if log_w is None:
        return losses.mean()
    return jnp.sum(jax.nn.softmax(log_w) * losses)


def source_like(key: jax.Array, batch: Batch) -> jax.Array:
    """The batch's own source, or a standard normal one."""
    return jax.random.normal(key, batch.x1.shape, batch.x1.dtype) if batch.x0 is None else batch.x0


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """The objective `(apply, params, key, batch) -> (loss, metrics)`.

    couple: pairs the source with the data and weighs the pairs; None takes them as they come.
    drop_rate: how often a row's condition is replaced by its `null`.
    """

    path: Path = dataclasses.field(default_factory=lambda: linear(1e-5))
    times: DrawTimes = Uniform()
    couple: Couple | None = None
    drop_rate: float = 0.1
    null: Null = null

    def __call__(self, apply: Apply, params: Any, key: jax.Array, batch: Batch) -> tuple[jax.Array, dict]:
        source_key, couple_key, time_key, drop_key = jax.random.split(key, 4)
        x0, x1, cond, log_w = source_like(source_key, batch), batch.x1, batch.cond, None
        if self.couple is not None:
            x0, x1, cond, log_w = self.couple(couple_key, x0, x1, cond)
        cond = drop(drop_key, cond, self.drop_rate, self.null)
        losses = fm_losses(apply, params, self.path, self.times(time_key, x1.shape[0]), x0, x1, cond)
        return weighted_mean(losses, log_w), {"unweighted_loss": losses.mean()}
