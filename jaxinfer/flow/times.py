"""Which times a model is trained at: uniform, weighted to the middle, on a grid, by segment, or as pairs.

Each is a frozen dataclass `(key, B) -> Times`. Logit-normal and mode: Esser et al. 2024 (arXiv:2403.03206); stratified:
blockwise flow matching (arXiv:2510.21167), each row's segment fixed by its place in the batch, so that every segment
gets its share; pairs: MeanFlow (arXiv:2505.13447). Papers that put the noise at t = 1 have their means negated here.
No state.

Stability: internal.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.errors import ConfigError
from jaxinfer.flow.types import Times


def _instantaneous(t: jax.Array) -> Times:
    return Times(t, t, jnp.zeros(t.shape, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Uniform:
    """t ~ U[0, 1], s = t."""

    def __call__(self, key: jax.Array, batch: int) -> Times:
        return _instantaneous(jax.random.uniform(key, (batch,)))


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std z), z standard normal; s = t. A positive mean leans to the data."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.std <= 0:
            raise ConfigError(f"std must be above 0, got {self.std}")

    def __call__(self, key: jax.Array, batch: int) -> Times:
        return _instantaneous(jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch,))))


@dataclasses.dataclass(frozen=True)
class Mode:
    """t = 1 - u - scale (cos(pi u / 2)^2 - 1 + u), u uniform: heavy in the middle, and never zero at the ends."""

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):  # beyond, the map from u to t is not monotonic
            raise ConfigError(f"scale must be in [-1, {2 / (math.pi - 2):.3f}], got {self.scale}")

    def __call__(self, key: jax.Array, batch: int) -> Times:
        u = jax.random.uniform(key, (batch,))
        t = 1 - u - self.scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)
        return _instantaneous(jnp.clip(t, 0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class Grid:
    """t = one of the K starts of the grid `ts` (K + 1 increasing numbers), s = the end of that step, seg its index."""

    ts: tuple[float, ...]

    def __post_init__(self):
        from jaxinfer.flow.schedule import check_grid

        check_grid(self.ts)

    def __call__(self, key: jax.Array, batch: int) -> Times:
        ts = jnp.asarray(self.ts, jnp.float32)
        seg = jax.random.randint(key, (batch,), 0, len(self.ts) - 1)
        return Times(ts[seg], ts[seg + 1], seg)


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Row i is in segment i mod M of M equal ones, t uniform within; s = t."""

    segments: int = 6

    def __post_init__(self):
        if self.segments < 1:
            raise ConfigError(f"segments must be at least 1, got {self.segments}")

    def __call__(self, key: jax.Array, batch: int) -> Times:
        seg = jnp.arange(batch, dtype=jnp.int32) % self.segments
        t = (seg + jax.random.uniform(key, (batch,))) / self.segments
        return Times(t, t, seg)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two draws of `base`, sorted into t <= s; each row has s = t with probability `ratio`.

    Independent of the row's place in the batch: the published code gives s = t to the batch's first rows, which are
    also the ones whose labels it drops.
    """

    ratio: float = 0.75
    base: Any = LogitNormal(0.4, 1.0)  # the paper's mean is -0.4, with the noise at t = 1

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"ratio must be in [0, 1], got {self.ratio}")

    def __call__(self, key: jax.Array, batch: int) -> Times:
        first, second, same = jax.random.split(key, 3)
        one, two = self.base(first, batch).t, self.base(second, batch).t
        # A row with s = t keeps its first draw: the smaller of two would not have the law of `base`.
        equal = jax.random.bernoulli(same, self.ratio, (batch,))
        t = jnp.where(equal, one, jnp.minimum(one, two))
        return Times(t, jnp.where(equal, one, jnp.maximum(one, two)), jnp.zeros((batch,), jnp.int32))


# MeanFlow's times for short trainings. Of the paper's pairs hardly any reaches from 0 to 1: after 400 updates from a
# trained flow of digits one step was at a Fréchet distance of 46.2, and with these at 6.5 (two steps: 4.3 and 5.4).
WIDE_PAIRS = Pair(0.5, Uniform())
TIMES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode}
