"""Low-rank adapters over any weight, arrays and quantized ones alike.

A LoRA weight is `base + scale * a @ b` with the base frozen: gradients reach `a` and `b` only.
Guarantee: a different model; at the start exactly the base's function; `quant.merge` is exact up to one rounding to the
base's dtype. State: none. The paper's defaults: rank 4 to 8, a normal, b zero, scale alpha / rank; no dropout here.
`rslora` scales by alpha / sqrt(rank), which keeps the size of the update when the rank grows.
Sources: Hu et al. 2021, LoRA, 2106.09685; over a quantized base: Dettmers et al. 2023, QLoRA, 2305.14314; rsLoRA:
Kalajdzievski 2023, 2312.03732.
Departure from the paper: embedding tables, which it leaves out, take the mirrored initialisation (`a` zero).

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import ConfigError, InputError
from jaxinfer.quant.adapter import AdapterLeaf, adapt, added, check_alpha, check_fits, check_rank, frozen
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class LoraArray(AdapterLeaf):
    """`base[..., K, N] + scale * a[..., K, r] @ b[..., r, N]`; base is any weight, or None for an adapter alone."""

    TRAINED: ClassVar[tuple[str, ...]] = ("a", "b")

    base: Any
    a: jax.Array
    b: jax.Array
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    def update(self) -> jax.Array:
        """What is added to the base, f32[..., K, N]."""
        return self.scale * (self.a.astype(jnp.float32) @ self.b.astype(jnp.float32))

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


@dataclasses.dataclass(frozen=True)
class Lora:
    """Fresh LoRA adapters of one rank. `scale = alpha / rank`, 1 by default; `rslora`: `alpha / sqrt(rank)`.

    The output side starts at zero; the input side is normal with variance 1 / in.
    """

    rank: int = 8
    alpha: float | None = None
    rslora: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_rank("lora", self.rank)
        check_alpha("lora", self.alpha)

    @property
    def scale(self) -> float:
        """The factor of the product."""
        if self.alpha is None:
            return 1.0
        return float(self.alpha) / (self.rank**0.5 if self.rslora else self.rank)

    def adapt(self, weight: Any, key: jax.Array, *, axis: int = -2) -> LoraArray:
        """The leaf over `weight[..., K, N]`."""
        *lead, rows, columns = weight.shape
        check_fits("lora", self.rank, min(rows, columns), "of the shorter side", weight)
        a = jnp.zeros((*lead, rows, self.rank), self.dtype)
        b = jnp.zeros((*lead, self.rank, columns), self.dtype)
        if axis == -1:
            b = jax.random.normal(key, b.shape, self.dtype) * columns**-0.5
        else:
            a = jax.random.normal(key, a.shape, self.dtype) * rows**-0.5
        return LoraArray(weight, a, b, self.scale)


def lora(
    params: Any, rules: Sequence[str], rank: int, key: jax.Array, *, alpha: float | None = None, dtype="float32"
) -> dict[str, Any]:
    """`quant.adapt` with one `Lora` for every matrix whose whole path one of the patterns `rules` matches."""
    if isinstance(rules, str):
        raise ConfigError(f"lora: rules is a sequence of patterns, got the string {rules!r}")
    spec = Lora(rank, alpha, dtype=dtype)
    return adapt(params, [(pattern, spec) for pattern in rules], key)


def _materialize(w: LoraArray) -> jax.Array:
    return added(w.base, w.update())


def _dot(x: jax.Array, w: LoraArray) -> jax.Array:
    return ops.dot(x, frozen(w.base)) + w.scale * ops.dot(ops.dot(x, w.a), w.b)


def _dot_transposed(x: jax.Array, w: LoraArray) -> jax.Array:
    return ops.dot_transposed(x, frozen(w.base)) + w.scale * ops.dot_transposed(ops.dot_transposed(x, w.b), w.a)


def _take(w: LoraArray, ids: jax.Array) -> jax.Array:
    base = ops.take(frozen(w.base), ids)
    return base + (w.scale * (ops.take(w.a, ids) @ w.b)).astype(base.dtype)


def _ragged_dot(x: jax.Array, w: LoraArray, group_sizes: jax.Array) -> jax.Array:
    low = ops.ragged_dot(ops.ragged_dot(x, w.a, group_sizes), w.b, group_sizes)
    return ops.ragged_dot(x, frozen(w.base), group_sizes) + w.scale * low


ops.register(
    LoraArray,
    ops.Rules(materialize=_materialize, dot=_dot, dot_transposed=_dot_transposed, take=_take, ragged_dot=_ragged_dot),
)
