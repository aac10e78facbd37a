"""Expert parallelism: each device has some of a mixture's experts, and tokens travel to theirs and back.

Two all-to-alls a layer (GShard: Lepikhin et al. 2020, 2006.16668; DeepSpeed-MoE: Rajbhandari et al. 2022, 2201.05596),
inside `shard_map`, around the same `ragged_dot` that one device uses.

Guarantee: exact, no token is dropped: a device sends at most `capacity` rows to another in a round, and rounds go on,
in lock-step and only while some device has rows left. State: none. Departures: GShard drops what exceeds its capacity;
`ragged_all_to_all`, which needs no capacity, runs on no CPU.

Stability: experimental.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxinfer import ops, quant
from jaxinfer.errors import ConfigError
from jaxinfer.models.decoder import ACTIVATION, Experts
from jaxinfer.models.moe import Routing, route
from jaxinfer.sharding.rules import AxisRules, mesh_here, names

SLACK = 1.25  # a round's capacity over the mean number of rows from one device to another
AXES = {
    "gate": ("experts", "embed", "mlp"),
    "up": ("experts", "embed", "mlp"),
    "down": ("experts", "mlp", "embed"),
}


def capacity_of(tokens: int, k: int, parts: int, *, slack: float = SLACK) -> int:
    """Rows that a device sends to another in one round: `slack` times the mean of its `tokens * k` rows."""
    return max(1, math.ceil(slack * tokens * k / parts))


def rounds_of(tokens: int, k: int, experts: int, parts: int, capacity: int) -> int:
    """Rounds that the most uneven routing takes: a token has at most one row for each expert of a device."""
    return -(-tokens * min(k, experts // parts) // capacity)


def apply(module: Experts, x: jax.Array, mesh: Mesh, rules: AxisRules, *, slack: float = SLACK) -> jax.Array:
    """What `Experts` computes of `x[B, T, D]`, the experts split over the mesh axis of the `experts` row.

    Rows of the batch are split over that axis too; the weights' other axes as the table says (columns of the experts'
    MLPs are summed in one all-reduce, an embed axis is gathered). A table that splits no experts exchanges nothing.
    Raises ConfigError where batch rows are not split over the experts' axis.
    """
    c, axis = module.config, rules["experts"]
    if axis is not None and (not isinstance(axis, str) or axis not in names(rules["batch"])):
        got = f"experts are split over {axis!r}, and rows over {rules['batch']!r}"
        raise ConfigError(f"{got}; accepted: one axis, among the rows'")
    wide = (c.num_experts, c.hidden_size, c.expert_size)
    shapes = {"gate": wide, "up": wide, "down": (c.num_experts, c.expert_size, c.hidden_size)}
    router = module.weight("router", (c.hidden_size, c.num_experts), ("embed", None))
    weights = {name: module.weight(name, shapes[name], axes) for name, axes in AXES.items()}
    # The embed axis arrives whole: a gather, as for every weight that is split over it.
    inner = rules.replace(embed=None)
    placed = {
        name: jax.tree.map(inner.spec, quant.map_axes(weights[name], axes), is_leaf=lambda leaf: type(leaf) is tuple)
        for name, axes in AXES.items()
    }
    uneven = x.shape[1] % rules.parts("context", mesh)  # as `Sharded.split` does
    tokens = PartitionSpec(rules["batch"], None if uneven else rules["context"], None)
    columns = names(rules["mlp"])
    parts = 1 if axis is None else mesh.shape[axis]

    def run(x, router, weights):
        flat = x.reshape(-1, x.shape[-1])
        routing = route(ops.dot(flat, router), c.experts_per_token, normalize=c.normalize_experts)
        if axis is None:
            rows = _run_experts(flat[routing.token], routing.group_sizes, weights, c)
        else:
            rows = _exchange(routing, flat, weights, axis=axis, parts=parts, config=c, slack=slack)
        return routing.gather(rows).reshape(1, *x.shape)

    whole = jax.tree.map(lambda leaf: PartitionSpec(*(None,) * leaf.ndim), router)
    # Columns are summed out here: the transpose of a sum in there would sum its gradient, the same on all, once more.
    part = PartitionSpec(columns or None, *tokens)
    columns_apart = jax.shard_map(
        run, mesh=mesh_here(mesh), in_specs=(tokens, whole, placed), out_specs=part, check_vma=False
    )(x, router, weights)  # fmt: skip
    return jax.lax.reduce_sum(columns_apart, (0,))  # jnp.sum would send bfloat16 as float32


def _exchange(routing: Routing, flat, weights, *, axis: str, parts: int, config: Any, slack: float) -> jax.Array:
    """The experts' outputs of the sorted rows `[M, D]`, of which each went to its expert's device and back."""
    c, k = config, config.experts_per_token
    total, own = routing.token.shape[0], c.num_experts // parts
    capacity = capacity_of(flat.shape[0], k, parts, slack=slack)
    rounds = rounds_of(flat.shape[0], k, c.num_experts, parts, capacity)
    # Sorted by expert, the rows of one device follow each other: device p's are start[p] .. start[p] + count[p] - 1.
    count = routing.group_sizes.reshape(parts, own).sum(1)
    start = jnp.cumsum(count) - count
    expert = jnp.repeat(jnp.arange(c.num_experts, dtype=jnp.int32), routing.group_sizes, total_repeat_length=total)

    def one(turn, out):
        place = turn * capacity + jnp.arange(capacity, dtype=jnp.int32)[None]  # [parts, capacity]
        live = place < count[:, None]
        index = jnp.where(live, start[:, None] + place, total)
        sent = jnp.take(flat, jnp.take(routing.token, index, mode="clip"), axis=0)
        kind = jnp.where(live, jnp.take(expert, index, mode="clip") % own, own)  # own: an empty place
        rows, kinds = (jax.lax.all_to_all(y, axis, 0, 0, tiled=True) for y in (sent, kind))
        done = _run_unsorted(rows.reshape(-1, rows.shape[-1]), kinds.reshape(-1), weights, own, c)
        back = jax.lax.all_to_all(done.reshape(rows.shape), axis, 0, 0, tiled=True)
        return out.at[index].set(back, mode="drop")

    out = one(jnp.int32(0), jnp.zeros((total, flat.shape[1]), flat.dtype))
    if rounds == 1:
        return out
    needed = jax.lax.pmax(-(-count.max() // capacity), axis)

    def more(out, turn):
        return jax.lax.cond(turn < needed, one, lambda turn, out: out, turn, out), None

    return jax.lax.scan(more, out, jnp.arange(1, rounds, dtype=jnp.int32))[0]


def _run_unsorted(rows, kinds, weights, own: int, config: Any) -> jax.Array:
    """The device's experts over the rows that came, `kinds i32[M]` in 0 .. own, where `own` marks an empty place."""
    order = jnp.argsort(kinds, stable=True)
    sizes = jnp.zeros(own, jnp.int32).at[kinds].add(1, mode="drop")
    # Empty places come last and belong to no group: the last expert takes them, and nobody reads what comes out.
    sizes = sizes.at[own - 1].add(rows.shape[0] - sizes.sum())
    found = _run_experts(rows[order], sizes, weights, config)
    return jnp.zeros_like(found).at[order].set(found)


def _run_experts(rows, sizes, weights, config: Any) -> jax.Array:
    """The gated MLPs of `rows[M, D]` that are sorted by expert, `sizes` of each."""
    hidden = ACTIVATION[config.activation](ops.ragged_dot(rows, weights["gate"], sizes))
    hidden = hidden * ops.ragged_dot(rows, weights["up"], sizes)
    return ops.ragged_dot(hidden, weights["down"], sizes)
