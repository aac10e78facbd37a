"""What the linear attention ops share at their edge: arguments checked, lengths cut off, pieces padded.

Stability: internal.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels._core import check
from jaxinfer.pallas_kernels._core.errors import argument_error

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    batch: int
    heads: int
    length: int
    key_dim: int
    value_dim: int
    dtype: str
    scale: float
    block: int | None
    interpret: bool

    @property
    def options(self) -> dict[str, Any]:
        """What the kernels take beside arrays."""
        return {"scale": self.scale, "block": self.block, "interpret": self.interpret}

    @classmethod
    def of(cls, sizes: dict[str, int], dtype: Any, scale: float, block: int | None, interpret: bool) -> Call:
        batch, heads, length, key_dim, value_dim = (sizes[letter] for letter in "BHTKV")
        return cls(batch, heads, length, key_dim, value_dim, str(dtype), float(scale), block, interpret)


def sequences(op: str, q: Array, k: Array, v: Array, state: Array | None, lengths: Array | None) -> dict[str, int]:
    """Check q, k [B, H, T, K], v [B, H, T, V], state f32 [B, H, K, V], lengths int [B] up to T; return the sizes."""
    named: dict[str, tuple[Any, str]] = {"q": (q, "B H T K"), "k": (k, "B H T K"), "v": (v, "B H T V")}
    if state is not None:
        named["state"] = (state, "B H K V")
    if lengths is not None:
        named["lengths"] = (lengths, "B")
    sizes = check.shapes(op, **named)
    for name, size in sizes.items():
        if size == 0:
            raise argument_error(op, "q or v", f"{name} = 0", "at least one of each")
    check.dtypes(op, q=q, k=k, v=v)
    if state is not None:
        check.dtypes(op, ("float32",), state=state)
    if lengths is not None:
        check.integers(op, lengths=lengths)
        check.within(op, 0, sizes["T"], lengths=lengths)
    return sizes


def token(op: str, q: Array, k: Array, v: Array, state: Array) -> dict[str, int]:
    """Check one token's q, k [B, H, K] and v [B, H, V] and its state f32 [B, H, K, V]; return the sizes."""
    sizes = check.shapes(op, q=(q, "B H K"), k=(k, "B H K"), v=(v, "B H V"), state=(state, "B H K V"))
    check.dtypes(op, q=q, k=k, v=v)
    check.dtypes(op, ("float32",), state=state)
    return sizes


def real(op: str, **numbers: Any) -> None:
    """Check for finite Python numbers."""
    for name, got in numbers.items():
        if isinstance(got, bool) or not isinstance(got, int | float) or not abs(got) < float("inf"):
            raise argument_error(op, name, repr(got), "a finite number")


def initial(state: Array | None, sizes: dict[str, int]) -> Array:
    """The state given, or zeros."""
    if state is not None:
        return state
    return jnp.zeros((sizes["B"], sizes["H"], sizes["K"], sizes["V"]), jnp.float32)


def keep_valid(x: Array, lengths: Array | None) -> Array:
    """x [B, H, T, d] with the tokens from `lengths` on set to zero."""
    if lengths is None:
        return x
    valid = jnp.arange(x.shape[2]) < lengths[:, None]
    return jnp.where(valid[:, None, :, None], x, jnp.zeros((), x.dtype))


def padded(x: Array, multiple: int) -> Array:
    """x [B, H, T, d] with zeros behind, T a multiple."""
    short = -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) if short else x


def power_of_two_up_to(length: int, most: int) -> int:
    """The smallest power of two that holds `length`, at most `most`."""
    return min(most, 1 << (length - 1).bit_length())


def one_token(q: Array, k: Array, v: Array, decay: Array, state: Array, scale: float) -> tuple[Array, Array]:
    """out [B, H, V] and the state after one token; decay [.., K or 1, 1]. Sums run on vector units, in float32."""
    state = decay * state + k.astype(jnp.float32)[..., None] * v.astype(jnp.float32)[..., None, :]
    out = scale * (q.astype(jnp.float32)[..., None] * state).sum(-2)
    return out.astype(v.dtype), state
