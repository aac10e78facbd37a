"""Affine paths between source and data: linear, cosine, variance preserving, or one's own, and what a velocity implies.

x_t = a(t) x1 + b(t) x0 and its time derivative v; with a, b and their derivatives known, a velocity gives back the end
points and, for a Gaussian source, the score. Linear: Lipman et al. 2022 (arXiv:2210.02747) with sigma_min, Liu et al.
2022 (arXiv:2209.03003) without; cosine and variance preserving as Albergo et al. 2023 (arXiv:2303.08797) and Song et
al. 2020 (arXiv:2011.13456) have them. No state. Latent flow matching takes sigma_min = 1e-5 (Dao et al. 2023,
arXiv:2307.08698).

Stability: internal.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError, InputError
from jaxinfer.flow.types import Path, bcast


@functools.cache  # one object for one setting, so that a path as a static argument compiles once
def linear(sigma_min: float = 0.0) -> Path:
    """x_t = t x1 + (1 - (1 - sigma_min) t) x0: straight lines. Raises `ConfigError` unless 0 <= sigma_min < 1."""
    if not 0 <= sigma_min < 1:
        raise ConfigError(f"sigma_min must be in [0, 1), got {sigma_min}")
    slope = sigma_min - 1.0
    return Path(
        a=lambda t: t,
        b=lambda t: 1.0 + slope * t,
        da=jnp.ones_like,
        db=lambda t: jnp.full_like(t, slope),
        name="linear",
    )


@functools.cache
def cosine() -> Path:
    """x_t = sin(pi t / 2) x1 + cos(pi t / 2) x0: constant variance between independent ends of the same variance."""
    half = math.pi / 2
    return Path(
        a=lambda t: jnp.sin(half * t),
        b=lambda t: jnp.cos(half * t),
        da=lambda t: half * jnp.cos(half * t),
        db=lambda t: -half * jnp.sin(half * t),
        name="cosine",
    )


@functools.cache
def vp(beta_min: float = 0.1, beta_max: float = 20.0, end: float = 1e-5) -> Path:
    """The variance-preserving diffusion with linear beta, read from noise to data.

    Its noise coefficient has an infinite slope at t = 1; times above 1 - `end` count as 1 - `end` there.
    """
    if not 0 < beta_min <= beta_max:
        raise ConfigError(f"vp needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")

    def alpha(t):
        u = jnp.maximum(1.0 - t, end)
        return jnp.exp(-0.25 * u * u * (beta_max - beta_min) - 0.5 * u * beta_min)

    def alpha_slope(t):
        u = jnp.maximum(1.0 - t, end)
        return alpha(t) * (0.5 * u * (beta_max - beta_min) + 0.5 * beta_min)

    def sigma(t):
        return jnp.sqrt(1.0 - alpha(t) ** 2)

    return Path(a=alpha, b=sigma, da=alpha_slope, db=lambda t: -alpha(t) * alpha_slope(t) / sigma(t), name="vp")


def custom(a: Callable[[jax.Array], jax.Array], b: Callable[[jax.Array], jax.Array]) -> Path:
    """A path of one's own from a and b, functions of f32[B]; their derivatives are taken. a(0) = b(1) = 0 and
    a(1) = b(0) = 1 are checked to 1e-3 (`ConfigError`)."""
    ends = jnp.asarray([0.0, 1.0])
    got_a, got_b = a(ends), b(ends)
    if not (jnp.allclose(got_a, ends, atol=1e-3) and jnp.allclose(got_b, 1 - ends, atol=1e-3)):
        raise ConfigError(f"a path needs a = [0, 1] and b = [1, 0] at t = [0, 1], got a = {got_a} and b = {got_b}")

    def slope(f):
        return lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]

    return Path(a=a, b=b, da=slope(a), db=slope(b))


PATHS: dict[str, Callable[[], Path]] = {"linear": linear, "cosine": cosine, "vp": vp}


def by_name(name: str) -> Path:
    """A path with its defaults. Raises `ConfigError` for a name that is not in PATHS."""
    if name not in PATHS:
        raise ConfigError(f"path {name!r} is none of {', '.join(PATHS)}")
    return PATHS[name]()


def interpolate(path: Path, x0: jax.Array, x1: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_t, v_t), both like x1[B, ...], at t f32[B]. Raises `InputError` where x0 and x1 differ in shape."""
    if x0.shape != x1.shape:
        raise InputError(f"source and data differ in shape: {x0.shape} and {x1.shape}")
    at = lambda f: bcast(f(t), x1).astype(x1.dtype)  # noqa: E731
    return at(path.a) * x1 + at(path.b) * x0, at(path.da) * x1 + at(path.db) * x0


def ends(path: Path, x: jax.Array, v: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x0, x1) that velocity v[B, ...] at x[B, ...] and t f32[B] points from and to."""
    a, b, da, db = (bcast(f(t), x).astype(x.dtype) for f in (path.a, path.b, path.da, path.db))
    scale = da * b - db * a
    return (da * x - a * v) / scale, (b * v - db * x) / scale


def score(path: Path, x: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    """The gradient of log p_t at x[B, ...] for a standard normal source; infinite where b(t) = 0."""
    return -ends(path, x, v, t)[0] / bcast(path.b(t), x).astype(x.dtype)
