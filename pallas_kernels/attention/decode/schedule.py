"""The stream-K split of LeanAttention: equal work for every worker, whatever the lengths in the batch.

Sanovar et al. 2024, "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of
Transformers", arXiv 2405.10480. The blocks of all items (a row, or a row and a head) stand in one sequence, item after
item; worker w takes the w-th of equal runs of it. A run may end inside an item, so an item's result is the merge of its
workers' parts. Worker w's part of item i is kept at slot i + w: along the sequence either i or w grows from one part to
the next, so that no two parts share a slot and items + workers - 1 slots are enough.

Stability: internal.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """`steps i32[]`, a worker's units; the unit of each step and worker, `item, block i32[S, W]`, `live bool[S, W]`.

    `first, last i32[N]`: the workers that an item's blocks begin and end with; first > last for an item of no blocks.
    """

    steps: jax.Array
    item: jax.Array
    block: jax.Array
    live: jax.Array
    first: jax.Array
    last: jax.Array


def stream_k(begin: jax.Array, end: jax.Array, *, workers: int, longest: int) -> Schedule:
    """Split blocks `begin[i] <= block < end[i]` (i32[N]) of each item among `workers`; no item has over `longest`."""
    counts = jnp.maximum(end - begin, 0)
    ends = jnp.cumsum(counts)
    starts, total = ends - counts, ends[-1]
    steps = (total + workers - 1) // workers
    most = -(-begin.shape[0] * longest // workers)
    unit = jnp.arange(workers) * steps + jnp.arange(most)[:, None]
    live = (jnp.arange(most)[:, None] < steps) & (unit < total)
    item = jnp.searchsorted(ends, unit, side="right", method="compare_all").astype(jnp.int32)
    item = jnp.minimum(item, begin.shape[0] - 1)
    block = jnp.where(live, begin[item] + unit - starts[item], 0)
    run = jnp.maximum(steps, 1)
    first, last = starts // run, jnp.where(counts > 0, (ends - 1) // run, -1)
    return Schedule(steps, item, block, live, first, last)


def parts_of(schedule: Schedule, workers: int) -> tuple[jax.Array, jax.Array]:
    """The slots that hold an item's parts, `i32[N, W]`, and which of them do, `bool[N, W]`."""
    worker = jnp.arange(workers)
    slots = jnp.arange(schedule.first.shape[0])[:, None] + worker
    return slots, (worker >= schedule.first[:, None]) & (worker <= schedule.last[:, None])
