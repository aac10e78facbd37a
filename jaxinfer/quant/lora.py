"""Low-rank adapters over any weight, arrays and quantized ones alike.

A LoRA weight is `base + scale * a @ b` with the base frozen: gradients reach `a` and `b` only. Train the adapters
alone (`attach(params, adapters)` inside the loss), serve them beside the base, or merge them into it.
Guarantee: `merge` is exact up to one rounding to the base's dtype. State: none.
Sources: Hu et al. 2021, LoRA, 2106.09685; over a quantized base: Dettmers et al. 2023, QLoRA, 2305.14314.
Departure from the paper: embedding tables, which it leaves out, take the mirrored initialisation (`a` zero).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant.tree import build, choose, leaves, map_axes, map_leaves, near, wraps


@struct.dataclass
class LoraArray:
    """`base[..., K, N] + scale * a[..., K, r] @ b[..., r, N]`; base is any weight, or None for an adapter alone."""

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.a.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the base."""
        return self.a.dtype if self.base is None else self.base.dtype

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> LoraArray:
        """The same leaf with logical axis names in place of arrays; the rank is not split."""
        *lead, rows, columns = logical_axes
        base = None if self.base is None else map_axes(self.base, logical_axes)
        return dataclasses.replace(self, base=base, a=(*lead, rows, None), b=(*lead, None, columns))

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2] or a[:-2] != b[:-2]:
            raise InputError(f"factors a {a} and b {b} do not fit together")
        if self.base is not None and tuple(self.base.shape) != self.shape:
            raise InputError(f"base {tuple(self.base.shape)} and its adapter {self.shape} differ")


def lora(
    params: Any, rules: Sequence[str], rank: int, key: jax.Array, *, alpha: float | None = None, dtype="float32"
) -> dict[str, Any]:
    """Params with a fresh adapter over every matrix whose whole path one of the `rules` matches.

    `scale = alpha / rank`, 1 by default. The output side starts at zero, so the function does not change; the input
    side is normal with variance 1/in. An adapter's start depends on the key and its path, not on the other rules.
    Raises ConfigError for a rank below 1 or above the matrix's shorter side, InputError for a rule without a match.
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"lora: rank must be a positive integer, got {rank!r}")
    if isinstance(rules, str):
        raise ConfigError(f"lora: rules is a sequence of patterns, got the string {rules!r}")
    chosen = choose(params, rules)
    scale = 1.0 if alpha is None else float(alpha) / rank

    def adapt(path: str, leaf: Any) -> Any:
        if path not in chosen:
            return leaf
        *lead, rows, columns = leaf.shape
        if rank > min(rows, columns):
            raise ConfigError(f"lora: rank {rank} is above the shorter side of {path} {tuple(leaf.shape)}")
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a, b = jnp.zeros((*lead, rows, rank), dtype), jnp.zeros((*lead, rank, columns), dtype)
        if input_axis(path) == -1:
            b = jax.random.normal(own, b.shape, dtype) * columns**-0.5
        else:
            a = jax.random.normal(own, a.shape, dtype) * rows**-0.5
        return LoraArray(leaf, a, b, scale)

    return map_leaves(adapt, params)


def input_axis(path: str) -> int:
    """The axis that a product sums over: -1 for embedding tables `[V, D]`, -2 for kernels `[in, out]`."""
    name = path.rsplit("/", 1)[-1]
    return -1 if name == "embedding" or name.endswith("_embedding") else -2


def adapters(params: Any) -> dict[str, Any]:
    """The adapters alone: a nested dict of the `LoraArray` leaves with `base=None`. What an optimiser is given."""
    pairs = [(path, leaf) for path, leaf in leaves(params) if isinstance(leaf, LoraArray)]
    return build([(path, dataclasses.replace(leaf, base=None)) for path, leaf in pairs])


def detach(params: Any) -> dict[str, Any]:
    """Params without their (outermost) adapters."""
    return map_leaves(lambda _, leaf: leaf.base if isinstance(leaf, LoraArray) else leaf, params)


def attach(params: Any, adapters: Any) -> dict[str, Any]:
    """Params with `adapters` over them: the inverse of `detach`. Raises InputError for one that fits nowhere."""
    given = _given(params, adapters)
    return map_leaves(lambda path, leaf: _over(path, leaf, given[path]) if path in given else leaf, params)


def merge(params: Any) -> dict[str, Any]:
    """Params with every adapter added into its base, which becomes a dense array of the base's dtype.

    A quantized base is materialized: the same function, more bytes; quantize again with `quant.apply` if its error
    is acceptable.
    """
    return map_leaves(lambda _, leaf: _merge(leaf), params)


def unmerge(params: Any, adapters: Any) -> dict[str, Any]:
    """The inverse of `merge` up to one rounding: subtract the adapters and put them over the rest.

    The unrounded base is gone after a merge; who needs it bit for bit keeps the tree that was merged.
    """

    def split(leaf: Any, adapter: LoraArray) -> Any:
        base = ops.materialize(leaf)
        return (base.astype(jnp.float32) - _delta(adapter)).astype(base.dtype)

    given = _given(params, adapters)
    return map_leaves(
        lambda path, leaf: _over(path, split(leaf, given[path]), given[path]) if path in given else leaf, params
    )


def _given(params: Any, adapters: Any) -> dict[str, LoraArray]:
    given, paths = dict(leaves(adapters)), [path for path, _ in leaves(params)]
    for path in given:
        if path not in paths:
            raise InputError(f"adapter {path} has no weight to go over; nearest paths: {near(path, paths)}")
    return given


def _over(path: str, base: Any, adapter: LoraArray) -> LoraArray:
    if tuple(base.shape) != adapter.shape:
        raise InputError(f"{path}: an adapter for {adapter.shape} does not fit a weight of {tuple(base.shape)}")
    return dataclasses.replace(adapter, base=base)


def _merge(leaf: Any) -> Any:
    if isinstance(leaf, LoraArray) and leaf.base is not None:
        return ops.materialize(leaf)
    return dataclasses.replace(leaf, base=_merge(leaf.base)) if wraps(leaf) else leaf


def _delta(w: LoraArray) -> jax.Array:
    return w.scale * (w.a.astype(jnp.float32) @ w.b.astype(jnp.float32))


def _frozen(w: LoraArray) -> Any:
    return jax.lax.stop_gradient(w.base)


def _materialize(w: LoraArray) -> jax.Array:
    base = ops.materialize(_frozen(w))
    return (base.astype(jnp.float32) + _delta(w)).astype(base.dtype)


def _dot(x: jax.Array, w: LoraArray) -> jax.Array:
    return ops.dot(x, _frozen(w)) + w.scale * ops.dot(ops.dot(x, w.a), w.b)


def _dot_transposed(x: jax.Array, w: LoraArray) -> jax.Array:
    return ops.dot_transposed(x, _frozen(w)) + w.scale * ops.dot_transposed(ops.dot_transposed(x, w.b), w.a)


def _take(w: LoraArray, ids: jax.Array) -> jax.Array:
    base = ops.take(_frozen(w), ids)
    return base + (w.scale * (ops.take(w.a, ids) @ w.b)).astype(base.dtype)


def _ragged_dot(x: jax.Array, w: LoraArray, group_sizes: jax.Array) -> jax.Array:
    low = ops.ragged_dot(ops.ragged_dot(x, w.a, group_sizes), w.b, group_sizes)
    return ops.ragged_dot(x, _frozen(w), group_sizes) + w.scale * low


ops.register(
    LoraArray,
    ops.Rules(materialize=_materialize, dot=_dot, dot_transposed=_dot_transposed, take=_take, ragged_dot=_ragged_dot),
)
