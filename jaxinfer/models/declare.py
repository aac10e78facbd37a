"""How a Linen module declares its weights and reads them back, whatever type of leaf stands there by then.

Stability: internal.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxinfer import ops
from jaxinfer.errors import InputError

Axes = tuple[str | None, ...]


class Declared(nn.Module):
    """A module whose weights may be arrays or any registered leaf type."""

    def weight(self, name: str, shape: tuple[int, ...], axes: Axes, init=None) -> Any:
        """Declare a weight (at init) or read it (at apply), checking its logical shape."""
        if not self.has_variable("params", name):
            init = nn.initializers.normal(0.02) if init is None else init
            return nn.unbox(self.param(name, nn.with_logical_partitioning(init, axes), shape))
        found = nn.unbox(self.get_variable("params", name))
        if tuple(found.shape) != shape:
            path = "/".join((*self.path, name))
            raise InputError(f"{path}: got shape {tuple(found.shape)}, the configuration needs {shape}")
        return found

    def affine(self, name: str, x: jax.Array, size: int, axes: Axes, *, gain: float = 1.0) -> jax.Array:
        """`x[..., D] @ w[D, size] + b`, w of variance gain / D at first, b (`<name>_bias`) zero."""
        init = nn.initializers.variance_scaling(gain, "fan_in", "truncated_normal") if gain else nn.initializers.zeros
        # As a matrix: of an x with more axes, XLA's CPU compiler first writes the transposed operands of w's gradient.
        y = ops.dot(x.reshape(-1, x.shape[-1]), self.weight(name, (x.shape[-1], size), axes, init))
        y = y.reshape(*x.shape[:-1], size)
        bias = self.weight(f"{name}_bias", (size,), axes[1:], nn.initializers.zeros)
        return y + ops.materialize(bias).astype(y.dtype).reshape((1,) * (y.ndim - 1) + (size,))


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x[..., D] with mean 0 and variance 1 over its last axis, without weights, computed in float32 or wider."""
    y = ops.widen(x)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)).astype(x.dtype)
