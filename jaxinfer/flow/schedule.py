"""Where a sampler steps: grids of times from 0 to 1, and the check that every grid passes.

uniform; shift (Esser et al. 2024, arXiv:2403.03206), which steps finer near the noise for larger images; cosine
(CosyVoice 2, Du et al. 2024, arXiv:2412.10117), finer near the noise too; edm (Karras et al. 2022, arXiv:2206.00364),
the noise levels of that sampler on the linear path, where sigma = (1 - t) / t. All give K + 1 numbers, t = 0 the
source. A grid of one's own, such as BOSS's, is any increasing one.

Stability: internal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxinfer.errors import ConfigError, InputError


def check_grid(ts: Any) -> None:
    """Raises `InputError` unless `ts` is one-dimensional, finite, strictly increasing, within [0, 1] and has a step.

    A traced grid cannot be looked at and passes.
    """
    if isinstance(ts, Tracer):
        return
    grid = np.asarray(ts, np.float64)
    if grid.ndim != 1 or grid.size < 2:
        raise InputError(f"a grid is a list of at least two times, got shape {grid.shape}")
    if not np.isfinite(grid).all() or grid.min() < 0 or grid.max() > 1:
        raise InputError(f"the times of a grid are in [0, 1], got {grid.tolist()}")
    steps = np.diff(grid)
    if (steps <= 0).any():
        k = int(np.argmax(steps <= 0))
        raise InputError(f"a grid must increase: its times {k} and {k + 1} are {grid[k]:g} and {grid[k + 1]:g}")


def _unit(steps: int) -> np.ndarray:
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    return np.linspace(0.0, 1.0, steps + 1)


def uniform(steps: int) -> np.ndarray:
    """Equal steps, f32[steps + 1]."""
    return _unit(steps).astype(np.float32)


def shift(steps: int, *, factor: float = 3.0) -> np.ndarray:
    """With u = 1 - t of equal steps, u' = factor u / (1 + (factor - 1) u); `factor` 1 is uniform."""
    if factor <= 0:
        raise ConfigError(f"factor must be above 0, got {factor}")
    u = 1.0 - _unit(steps)
    return (1.0 - factor * u / (1.0 + (factor - 1.0) * u)).astype(np.float32)


def cosine(steps: int) -> np.ndarray:
    """1 - cos(pi t / 2) of equal steps."""
    ts = (1.0 - np.cos(0.5 * np.pi * _unit(steps))).astype(np.float32)
    ts[-1] = 1.0
    return ts


def edm(steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """t = 1 / (1 + sigma) of noise levels equal in sigma^(1/rho), then sigma = 0; the first becomes t = 0."""
    if not 0 < sigma_min < sigma_max:
        raise ConfigError(f"edm needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (high + _unit(max(steps - 1, 1)) * (low - high)) ** rho
    ts = 1.0 / (1.0 + np.append(levels, 0.0)) if steps > 1 else np.array([0.0, 1.0])
    ts[0] = 0.0
    return ts.astype(np.float32)


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {"uniform": uniform, "shift": shift, "cosine": cosine, "edm": edm}


def make(name: str | Sequence[float], steps: int | None = None) -> np.ndarray:
    """The grid of a schedule's name and its number of steps, or the times given, checked.

    Raises `ConfigError` for an unknown name or a missing number, `InputError` for a grid that is not increasing.
    """
    if not isinstance(name, str):
        check_grid(name)
        return np.asarray(name, np.float32)
    if name not in SCHEDULES:
        raise ConfigError(f"schedule {name!r} is none of {', '.join(SCHEDULES)}")
    if steps is None:
        raise ConfigError(f"schedule {name!r} needs a number of steps")
    return SCHEDULES[name](steps)
