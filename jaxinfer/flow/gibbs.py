"""Weighted conditional flow matching: independent pairs weighted by the Gibbs kernel, straighter without transport.

A pair (x0, x1) counts exp(-|x0 - x1| / eps) times, which is entropic optimal transport with both potentials left out:
it favours near pairs like minibatch transport, at no cost, and moves no label. Calvo-Ordonez et al. (2025), "Weighted
Conditional Flow Matching", arXiv 2507.22270.

Guarantee: approximate. The minimiser is the marginal field of the tilted coupling, whose marginals are those asked for
times tau(x) = E_y w(x, y), up to a constant. Where tau varies the samples are BIASED: `tilt_variance` measures it,
and `effective_share` how much of a batch still counts. State: none.

Paper's defaults: the Euclidean norm (not its square), eps = kappa sqrt(d) with kappa at the elbow of the tilt's
relative variance (CIFAR-10: eps = 5). Departure: log-weights are normalised to a mean weight of 1 over the batch, so
that the learning rate means what it means for flow matching.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.flow.couple import check


@dataclasses.dataclass(frozen=True)
class Gibbs:
    """The coupling `(key, x0[B, ...], x1[B, ...], cond) -> (x0, x1, cond, log_w f32[B])` of temperature `eps`, in the
    units of x. Raises ConfigError for an eps that is not positive."""

    eps: float

    def __post_init__(self):
        if not (self.eps > 0 and math.isfinite(self.eps)):
            raise ConfigError(f"eps: got {self.eps}, accepts a positive number")

    def __call__(self, key: jax.Array, x0: jax.Array, x1: jax.Array, cond: Any):
        check(x0, x1)
        log_w = -distance(x0, x1) / self.eps
        return x0, x1, cond, log_w - jax.nn.logsumexp(log_w) + math.log(len(log_w))


def distance(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """The Euclidean norm of each row's difference, f32[B]."""
    return jnp.linalg.norm((x0 - x1).astype(jnp.float32).reshape(x0.shape[0], -1), axis=1)


def temperature(kappa: float, x: jax.Array) -> float:
    """eps = kappa sqrt(d) for data x[B, ...] of d numbers a row."""
    return kappa * math.sqrt(math.prod(x.shape[1:]))


def effective_share(log_w: jax.Array) -> jax.Array:
    """The effective sample size of a batch over its size, (sum w)^2 / (B sum w^2), f32[]; 1 for equal weights."""
    total, squares = jax.nn.logsumexp(log_w), jax.nn.logsumexp(2 * log_w)
    return jnp.exp(2 * total - squares) / log_w.shape[0]


@jax.jit
def tilt(x0: jax.Array, x1: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """What the weights multiply the two marginals by: tau of each source f32[N] and of each of the data f32[M], over
    their means. x0[N, ...], x1[M, ...]: samples of each."""
    flat0, flat1 = (x.astype(jnp.float32).reshape(x.shape[0], -1) for x in (x0, x1))
    # Row by row, so that no [N, M, d] array is made.
    log_w = jax.lax.map(lambda row: -jnp.linalg.norm(row - flat1, axis=1) / eps, flat0)
    log_w -= log_w.max()
    taus = jnp.exp(jax.nn.logsumexp(log_w, axis=1)), jnp.exp(jax.nn.logsumexp(log_w, axis=0))
    return taus[0] / taus[0].mean(), taus[1] / taus[1].mean()


def tilt_variance(x0: jax.Array, x1: jax.Array, eps: float) -> tuple[float, float]:
    """Var(tau) / E[tau]^2 of the sources' and of the data's marginal: 0 where the weights do not bias it."""
    source, data = tilt(x0, x1, eps)
    return float(source.var()), float(data.var())


def choose_temperature(
    x0: jax.Array, x1: jax.Array, kappas: Sequence[float], *, most: float = 0.05, least_share: float = 0.3
) -> float:
    """The least eps = kappa sqrt(d) whose bias is borne: both tilt variances at most `most`, and at least `least_share`
    of a batch of independent pairs counting. x0[N, ...], x1[N, ...]: samples. Raises ConfigError where none is."""
    found = []
    for kappa in sorted(kappas):
        eps = temperature(kappa, x1)
        tilts = tilt_variance(x0, x1, eps)
        share = float(effective_share(-distance(x0, x1) / eps))
        if max(tilts) <= most and share >= least_share:
            return eps
        found.append(f"kappa {kappa}: tilt {max(tilts):.3g}, share {share:.2f}")
    what = f"a tilt of at most {most} and an effective share of at least {least_share}"
    raise ConfigError(
        f"kappas: none of {np.asarray(kappas).tolist()} gives {what} ({'; '.join(found)}): try larger ones"
    )
