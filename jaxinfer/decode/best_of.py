"""Best of n: several samples of a prompt, of which the one with the highest reward is kept.

Stiennon et al. 2020 (arXiv:2009.01325) evaluate it. Guarantee: each sample follows the target's law; the best one
follows the law tilted towards the reward only roughly, and n 1 is plain sampling. No state.

Stability: experimental.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.decode.loop import Result, select
from jaxinfer.errors import InputError


def best_of(result: Result, reward: jax.Array, n: int) -> Result:
    """The row of each prompt's `n` in `result` (as `generate` with `Config(n=n)` lays them, prompt-major) with the
    highest `reward f32[B * n]`; the first of equals, NaN last. Raises InputError where the sizes do not fit."""
    rows = result.lengths.shape[0]
    if n < 1 or rows % n:
        raise InputError(f"n: got {n}, accepts a divisor of the {rows} rows")
    if reward.shape != (rows,):
        raise InputError(f"reward: got shape {list(reward.shape)}, accepts {[rows]}, one a row")
    table = jnp.where(jnp.isnan(reward), -jnp.inf, reward).reshape(-1, n)
    return select(result, jnp.arange(rows // n) * n + table.argmax(1))
