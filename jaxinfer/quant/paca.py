"""PaCA: chosen inputs of a matrix are trained in place, and only their activations are kept for the backward pass.

Of `x @ W` with `W[in, out]` (the paper's columns of `W[out, in]`) `rank` rows are drawn at random once and trained:
`W[index] = base[index] + scale * delta`. There is no second path of full width, and the gradient of `delta` needs
`x[..., index]` alone, where LoRA's needs all of x.
Guarantee: a different model; at the start exactly the base's function; the gradient is the one of full fine-tuning,
restricted to the chosen rows, times scale. State: none. The paper's defaults: rank 8, alpha 16, scale alpha / rank.
Source: Woo et al. 2025, PaCA, 2503.01905.
Departures: the paper trains `W[index] / scale`, we its difference from the start. The gradients are the same, the start
is not rounded, weight decay pulls towards the base rather than to zero, and the base may be quantized. Embedding tables
are refused: a look-up has no inputs to choose from.

Stability: experimental.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxinfer import ops
from jaxinfer.errors import InputError
from jaxinfer.quant.adapter import AdapterLeaf, added, check_alpha, check_fits, check_rank, frozen, only_kernels
from jaxinfer.quant.tree import map_axes


@struct.dataclass
class PacaArray(AdapterLeaf):
    """`base[..., K, N]` with `scale * delta[..., r, N]` added to its rows `index i32[..., r]`; base None: alone.

    `inputs` is K.
    """

    TRAINED: ClassVar[tuple[str, ...]] = ("delta",)

    base: Any
    index: jax.Array
    delta: jax.Array
    inputs: int = struct.field(pytree_node=False)
    scale: float = struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return (*self.delta.shape[:-2], self.inputs, self.delta.shape[-1])

    def update(self) -> jax.Array:
        """What is added to the base, f32[..., K, N]."""
        *lead, rank, columns = self.delta.shape
        scatter = lambda index, rows: jnp.zeros((self.inputs, columns)).at[index].add(rows)  # noqa: E731
        rows = self.scale * self.delta.astype(jnp.float32)
        flat = jax.vmap(scatter)(self.index.reshape(-1, rank), rows.reshape(-1, rank, columns))
        return flat.reshape(*lead, self.inputs, columns)

    def map_axes(self, logical_axes: tuple[str | None, ...]) -> PacaArray:
        """The same leaf with logical axis names in place of arrays; the chosen rows are not split."""
        *lead, _, columns = logical_axes
        base = None if self.base is None else map_axes(self.base, logical_axes)
        return dataclasses.replace(self, base=base, index=(*lead, None), delta=(*lead, None, columns))

    def check(self) -> None:
        """Raise InputError where the arrays contradict each other."""
        index, delta = tuple(self.index.shape), tuple(self.delta.shape)
        if len(delta) < 2 or index != delta[:-1]:
            raise InputError(f"index {index} and rows {delta} do not fit together")
        if self.base is not None and tuple(self.base.shape) != self.shape:
            raise InputError(f"base {tuple(self.base.shape)} and its adapter {self.shape} differ")


@dataclasses.dataclass(frozen=True)
class Paca:
    """Fresh partial connections: `rank` inputs of each matrix, drawn without replacement; `scale = alpha / rank`."""

    rank: int = 8
    alpha: float | None = 16.0
    dtype: str = "float32"

    def __post_init__(self):
        check_rank("paca", self.rank)
        check_alpha("paca", self.alpha)

    def adapt(self, weight: Any, key: jax.Array, *, axis: int = -2) -> PacaArray:
        """The leaf over `weight[..., K, N]`."""
        only_kernels("paca", weight, axis)
        *lead, rows, columns = weight.shape
        check_fits("paca", self.rank, rows, "inputs", weight)
        draw = lambda key: jnp.sort(jax.random.permutation(key, rows)[: self.rank])  # noqa: E731
        index = jax.vmap(draw)(jax.random.split(key, int(np.prod(lead, dtype=int))))
        scale = 1.0 if self.alpha is None else float(self.alpha) / self.rank
        delta = jnp.zeros((*lead, self.rank, columns), self.dtype)
        return PacaArray(weight, index.reshape(*lead, self.rank).astype(jnp.int32), delta, rows, scale)


def _materialize(w: PacaArray) -> jax.Array:
    return added(w.base, w.update())


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x: jax.Array, base: Any, index: jax.Array, delta: jax.Array, scale: float) -> jax.Array:
    return _forward(x, base, index, delta, scale)[0]


def _forward(x, base, index, delta, scale):
    kept = jnp.take(x, index, axis=-1)
    return ops.dot(x, base) + scale * ops.dot(kept, delta), (kept, base, index, delta)


def _backward(scale, saved, dy):
    kept, base, index, delta = saved
    rank, columns = delta.shape
    dx = ops.dot_transposed(dy, base)
    dx = dx.at[..., index].add(scale * ops.dot_transposed(dy, delta))
    flat = kept.reshape(-1, rank).T, dy.reshape(-1, columns)
    d_delta = scale * jnp.matmul(*flat, preferred_element_type=jnp.float32)
    return dx, None, None, d_delta.astype(delta.dtype)


_product.defvjp(_forward, _backward)


def _dot(x: jax.Array, w: PacaArray) -> jax.Array:
    return _product(x, w.base, w.index, w.delta, w.scale)


def _ragged_dot(x: jax.Array, w: PacaArray, group_sizes: jax.Array) -> jax.Array:
    expert = jnp.repeat(jnp.arange(w.index.shape[0]), group_sizes, total_repeat_length=x.shape[0])
    kept = jnp.take_along_axis(x, w.index[expert], axis=-1)
    return ops.ragged_dot(x, frozen(w.base), group_sizes) + w.scale * ops.ragged_dot(kept, w.delta, group_sizes)


ops.register(PacaArray, ops.Rules(materialize=_materialize, dot=_dot, ragged_dot=_ragged_dot))
