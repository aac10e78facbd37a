"""The arithmetic of one tile of scores, shared by every form: scale, soft-cap, ALiBi, and who sees whom.

Scores are kept in base 2, since the exponential of every machine is exp2: a softmax does not care which base it is
taken in, and only the log-sum-exp has to be brought back. ALiBi: Press et al. (2021), arXiv 2108.12409; soft-capping:
Gemma 2 (2024), arXiv 2408.00118.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# A score that is not seen lies so far below any running peak, also below the peak of a row that has seen nothing yet,
# that its exponential is an exact zero: no -inf enters the arithmetic and no weight needs a second mask.
UNSEEN = -1e30
NO_PEAK = -1e29


@dataclasses.dataclass(frozen=True)
class Rules:
    """What every score of a call obeys. Query i of a row is at position i + keys - queries, so the last ones align."""

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None

    def visible(self, distance: jax.Array) -> jax.Array | None:
        """Whether a key at `distance` = query position - key position is seen; None where all are."""
        if self.window is None:
            return distance >= 0 if self.causal else None
        near = distance < self.window
        return near & (distance >= 0) if self.causal else near & (distance > -self.window)

    def scores(self, product: jax.Array, distance: jax.Array, slope: jax.Array | None) -> jax.Array:
        """Base-2 scores f32 of the products q k; `slope` of this head, broadcastable, or None."""
        if self.softcap is None:
            score = product * (self.scale * LOG2E)
        else:
            score = jnp.tanh(product * (self.scale / self.softcap)) * (self.softcap * LOG2E)
        return score if slope is None else score - slope * LOG2E * jnp.abs(distance).astype(jnp.float32)

    def slope_of_cap(self, product: jax.Array) -> jax.Array | float:
        """The derivative of a natural score by its product, over `scale`: what soft-capping leaves of a gradient."""
        if self.softcap is None:
            return 1.0
        return 1.0 - jnp.square(jnp.tanh(product * (self.scale / self.softcap)))

    def first_key(self, position: jax.Array | int) -> jax.Array | int:
        """The first key that any query from `position` on can see."""
        return 0 if self.window is None else position - self.window + 1

    def end_key(self, position: jax.Array | int, keys: jax.Array | int) -> jax.Array | int:
        """One past the last of `keys` keys that any query up to `position` can see."""
        if self.causal:
            return jnp.minimum(position + 1, keys)
        return keys if self.window is None else jnp.minimum(position + self.window, keys)


def finish(peak: jax.Array, total: jax.Array, acc: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """`(out, lse)` of the running peak and sum `f32[rows]` in base 2 and the weighted values `f32[rows, e]`."""
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, (peak + jnp.log2(divisor)) * LN2)
    return (acc / divisor[..., None]).astype(dtype), lse


def backward_rows(out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the backward pass needs of each row: the log-sum-exp in base 2, and sum(dout * out) - dlse.

    The gradient of a score is weight * (dout . v - that). Rows that see nothing get finite values here, and all their
    weights are zero.
    """
    empty = lse == -jnp.inf
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), -1) - dlse
    return jnp.where(empty, 0.0, lse * LOG2E), jnp.where(empty, 0.0, delta)
