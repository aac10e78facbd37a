"""Merging attention over disjoint sets of keys, exactly: the softmax weights of the parts' log-sum-exps.

Attention over the union of key sets is the average of the parts weighted by exp(lse - lse of the union); Milakov and
Gimelshein (2018), "Online normalizer calculation for softmax", arXiv 1805.02867. Split caches, shared prefixes, trees
and rings are this function and calls of the kernels.

Stability: experimental.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error


def combine(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over all the parts' keys: `parts` are `(out[..., d], lse f32[...])`, and so is the result.

    `out` comes in the parts' dtype and is accumulated in float32, `lse` is the natural logarithm of the sum of
    exponentials. A row that sees no key has lse = -inf and out = 0, in a part and in the result; gradients through
    such rows are zero. Raises ArgumentError for no parts, or for shapes or dtypes that do not agree.
    """
    _check(parts)
    lses = [lse for _, lse in parts]
    # The peak cancels from both results, so it needs no gradient; of a row without keys it is 0, so that -inf - peak
    # stays -inf and its exponential a plain zero, in the gradient too.
    peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, lses))
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = [jnp.exp(lse - peak) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    scaled = [(w / divisor)[..., None] * out.astype(jnp.float32) for w, (out, _) in zip(weights, parts, strict=True)]
    out = functools.reduce(jnp.add, scaled).astype(parts[0][0].dtype)
    return out, jnp.where(empty, -jnp.inf, peak + jnp.log(divisor))


def _check(parts: Sequence[tuple[jax.Array, jax.Array]]) -> None:
    if not parts:
        raise argument_error("combine", "parts", "none", "at least one (out, lse)")
    first = parts[0][0]
    check.dtypes("combine", out=first)
    for i, (out, lse) in enumerate(parts):
        if out.ndim < 1 or out.shape != first.shape:
            raise argument_error("combine", f"parts[{i}].out", list(out.shape), f"the first part's {list(first.shape)}")
        if out.dtype != first.dtype:
            raise argument_error("combine", f"parts[{i}].out", out.dtype, f"the first part's {first.dtype}")
        if lse.shape != out.shape[:-1]:
            raise argument_error(
                "combine", f"parts[{i}].lse", list(lse.shape), f"{list(out.shape[:-1])}, out without d"
            )
        if lse.dtype != jnp.float32:
            raise argument_error("combine", f"parts[{i}].lse", lse.dtype, "float32")
